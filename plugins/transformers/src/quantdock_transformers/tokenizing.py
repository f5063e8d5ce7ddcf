"""Tokenizers: the source's own, or one that a user names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from quantdock import Source, UnsupportedError
from quantdock_transformers.chatting import open_tokenizer


def token_ids(texts: Sequence[str], named: Any, source: Source) -> list[list[int]]:
    """Token ids of texts, with what the tokenizer puts around them.

    Args:
        texts: any number.
        named: a tokenizer, the path (or cached repository) of one, or ``None`` for the source's own.
        source: where the weights come from.

    Raises:
        UnsupportedError: there is no tokenizer, or it can't be used.
    """
    tokenizer = _tokenizer(named, source)
    found = tokenizer(list(texts))
    return [list(ids) for ids in found["input_ids"]]


def _tokenizer(named: Any, source: Source) -> Any:
    if named is None:
        tokenizer = open_tokenizer(source)
        if tokenizer is None:
            raise UnsupportedError(
                f"{source.name} has no tokenizer, and the calibration data are texts; pass tokenizer=, or token ids"
            )
        return tokenizer
    if isinstance(named, str | os.PathLike):
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(os.fspath(named), trust_remote_code=False, local_files_only=True)
        except Exception as error:  # the tokenizers library raises nothing more precise for a broken file
            raise UnsupportedError(
                f"tokenizer={os.fspath(named)!r} can't be loaded: {type(error).__name__}: {error}"
            ) from error
    if not callable(named):
        raise UnsupportedError(
            f"tokenizer is {type(named).__name__}, expected a tokenizer of transformers or the path of one"
        )
    return named
