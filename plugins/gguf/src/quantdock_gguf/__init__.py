"""GGUF files as checkpoints, as a quantdock plugin."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def tokenizer(file: str | os.PathLike[str]) -> Any:
    """The tokenizer that a GGUF file carries, as transformers makes it.

    Args:
        file: the GGUF file; of a split model, the first part.
    """
    from transformers import AutoTokenizer

    path = Path(file)
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
