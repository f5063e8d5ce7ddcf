"""torchao itself, imported when it is needed: that takes seconds, and says things that are of no use to anybody."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@functools.cache
def module(name: str) -> Any:
    """A module of torchao."""
    with _quiet():
        return importlib.import_module(name)


@contextmanager
def _quiet() -> Iterator[None]:
    """Drop what torchao's import logs on every machine of a kind; what could be a fault of this one passes."""
    loggers = [logging.getLogger("torchao"), logging.getLogger("torch.utils._pytree")]
    for logger in loggers:
        logger.addFilter(_matters)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_matters)


def _matters(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    if "register_constant()" in message:  # torch 2.13 to torchao 0.18, about an enum
        return False
    # The libraries of the wheel are for CUDA, and can't be loaded beside a torch without it.
    return not (message.startswith("Failed to load") and torch.version.cuda is None)
