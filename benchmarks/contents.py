"""What was loaded, counted the same way whoever loaded it."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping

import torch

from benchmarks.contenders import Loaded, state_of

_PAGE = 4096


def tensors_of(loaded: Loaded) -> Iterator[torch.Tensor]:
    """Every tensor that a model or a state dict holds, each piece of memory once.

    Looks at parameters, buffers, attributes of modules and parameters, and one object further: bitsandbytes keeps
    scales and code books in a ``QuantState`` beside its weights, and another one inside of that.
    """
    seen: set[int] = set()
    regions: set[tuple[int, int]] = set()
    pending: list[object] = [loaded]
    while pending:
        item = pending.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor) and not item.is_meta:
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
    """Name -> dtype, shape and checksum of everything in the state dict."""
    return {
        name: f"{tensor.dtype}{list(tensor.shape)}:{zlib.crc32(_bytes(tensor).numpy().data):08x}"
        for name, tensor in state_of(loaded).items()
    }


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
