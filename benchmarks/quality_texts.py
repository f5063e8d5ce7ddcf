"""Model and texts for measuring quality: two texts that every Python installation has."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any


def reference() -> str:
    """the Python language reference, as `help()` shows it."""
    from pydoc_data.topics import topics

    return "\n\n".join(str(topics[name]) for name in sorted(topics))


def docstrings() -> str:
    """the docstrings of Python's standard library."""
    folder = Path(sysconfig.get_path("stdlib"))
    found: list[str] = []
    for path in sorted(folder.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
        owners = [node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
        found += [text for owner in owners if (text := ast.get_docstring(owner)) and len(text) > 400]
    return "\n\n".join(found)


def text(path: Path | None, default: Callable[[], str]) -> str:
    """The text of a file, or the default's."""
    return default() if path is None else path.read_text(encoding="utf-8")


def samples(tokenizer: Any, content: str, count: int, length: int) -> list[list[int]]:
    """``count`` runs of ``length`` tokens, spread evenly over a text.

    Raises:
        SystemExit: it is too short.
    """
    parts = [content[start : start + (1 << 16)] for start in range(0, len(content), 1 << 16)]
    ids = [token for part in parts for token in tokenizer(part)["input_ids"]]
    if len(ids) < count * length:
        raise SystemExit(f"the text has {len(ids)} tokens, and {count} samples of {length} were asked for")
    step = len(ids) // count
    return [ids[start * step : start * step + length] for start in range(count)]


def model(path: Path | None) -> Path:
    """The model to measure; the demo's, fetched if need be, if none is named."""
    if path is not None:
        return path.resolve()
    from demo.fetch_model import fetch

    return fetch()


def tokenizer(path: Path) -> Any:
    """The model's own."""
    from transformers import AutoTokenizer

    if path.is_file():
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return AutoTokenizer.from_pretrained(path)
