"""What was loaded, counted the same way whoever loaded it."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from benchmarks.contenders import Loaded, state_of

_PAGE = 4096


def tensors_of(loaded: Loaded) -> Iterator[torch.Tensor]:
    """Every tensor that a model or a state dict holds, each piece of memory once.

    Looks at parameters, buffers, attributes of modules and parameters, and one object further: bitsandbytes keeps
    scales and code books in a ``QuantState`` beside its weights, and another one inside of that. torchao's and quanto's
    tensors hold others, and have no memory of their own.
    """
    seen: set[int] = set()
    regions: set[tuple[int, int]] = set()
    pending: list[object] = [loaded]
    while pending:
        item = pending.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor) and not item.is_meta and not _inner(item):
            region = (item.data_ptr(), item.nbytes)
            if region not in regions:
                regions.add(region)
                yield item
        pending += _held_by(item)


def _held_by(item: object) -> list[object]:
    if isinstance(item, Mapping):
        return list(item.values())
    if isinstance(item, list | tuple):
        return list(item)
    if isinstance(item, torch.nn.Module | torch.Tensor) or type(item).__module__.startswith("bitsandbytes."):
        return list(vars(item).values())
    return []


def nbytes(loaded: Loaded) -> int:
    """Bytes of all tensors."""
    return sum(tensor.nbytes for tensor in tensors_of(loaded))


def touch(loaded: Loaded) -> None:
    """Read a byte of every page: a weight that is only mapped so far becomes resident."""
    for tensor in tensors_of(loaded):
        if tensor.device.type == "cpu" and tensor.numel():
            _bytes(tensor)[::_PAGE].max()


def checksums(loaded: Loaded) -> dict[str, str]:
    """Name -> dtype, shape and checksum of everything in the state dict; of the tensors that make up one, each."""
    return {
        name: f"{part.dtype}{list(part.shape)}:{zlib.crc32(_bytes(part).numpy().data):08x}"
        for whole, tensor in state_of(loaded).items()
        for name, part in _plain(whole, tensor)
    }


def _plain(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """A tensor, or those that it is made of."""
    inner = _inner(tensor)
    if not inner:
        yield name, tensor
    for attribute in inner:
        yield from _plain(f"{name}.{attribute}", getattr(tensor, attribute))


def _inner(tensor: Any) -> list[str]:
    """The attributes that hold what a tensor without memory of its own is made of; none of any other."""
    return list(tensor.__tensor_flatten__()[0]) if is_traceable_wrapper_subclass(tensor) else []


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
