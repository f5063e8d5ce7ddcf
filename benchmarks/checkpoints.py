"""Synthetic checkpoints in bfloat16, streamed to disk tensor by tensor without building a model.

A checkpoint is made once per folder and appears there whole or not at all.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from benchmarks.presets import Preset

_STD = 0.02
_POOL = 2**25 + 39
"""Random numbers that are made and then repeated: 64 MiB, so that writing goes at the disk's speed. Odd, so that a
tensor doesn't start where the one before it did."""
_ONE = b"\x80\x3f"  # 1.0 in bfloat16
_INDEX = "model.safetensors.index.json"

Named = tuple[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint on disk."""

    preset: str
    folder: Path

    @property
    def shards(self) -> list[Path]:
        """The weight files, in order."""
        return sorted(self.folder.glob("*.safetensors"))

    @property
    def nbytes(self) -> int:
        """Bytes of the weight files."""
        return sum(shard.stat().st_size for shard in self.shards)

    def __str__(self) -> str:
        return f"{self.preset}: {self.nbytes / 1e9:.2f} GB in {len(self.shards)} files"


def make(name: str, preset: Preset, cache: Path, *, sparse: bool = False) -> Checkpoint:
    """The checkpoint of a preset, in ``cache``; written now if it isn't there.

    Args:
        name: of the preset; with its family, the folder's name.
        preset: its sizes.
        cache: the folder that holds it.
        sparse: only the headers are real; the values are holes, which take no room on the disk.
    """
    folder = cache / f"{preset.family}-{name}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=f"{folder.name}-") as aside:
            whole = Path(aside, "whole")
            whole.mkdir()
            _write(preset, whole, sparse)
            whole.rename(folder)
    return Checkpoint(preset=name, folder=folder)


def _write(preset: Preset, folder: Path, sparse: bool) -> None:
    shapes = list(preset.shapes())
    pool = b"" if sparse else _random(min(_POOL, sum(math.prod(shape) for _, shape in shapes)))
    shards = _split(shapes, preset.shards)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with (folder / file).open("wb") as stream:
            stream.write(_header(shard))
            if sparse:
                stream.truncate(stream.tell() + _nbytes(shard))
            else:
                _write_values(stream, shard, memoryview(pool), first=len(weight_map))
        weight_map |= dict.fromkeys((name for name, _ in shard), file)
    index = {"metadata": {"total_size": _nbytes(shapes)}, "weight_map": weight_map}
    (folder / _INDEX).write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(preset.config(), indent=2))


def _header(shard: Sequence[Named]) -> bytes:
    """Of a safetensors file: its length, then JSON, padded so that the values start at a multiple of 8."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shard:
        start, end = end, end + 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_values(stream: BinaryIO, shard: Sequence[Named], pool: memoryview, first: int) -> None:
    """Small random numbers for matrices, each starting elsewhere in the pool; ones for norms."""
    for index, (_, shape) in enumerate(shard, first):
        left = 2 * math.prod(shape)
        if len(shape) == 1:
            stream.write(_ONE * (left // 2))
            continue
        start = 2 * (index * 1_000_003 % (len(pool) // 2))
        while left:
            piece = pool[start : start + left]
            stream.write(piece)
            left -= len(piece)
            start = 0


def _random(count: int) -> bytes:
    """``count`` normally distributed numbers in bfloat16."""
    import torch

    generator = torch.Generator().manual_seed(0)
    numbers = torch.empty(count, dtype=torch.bfloat16).normal_(0.0, _STD, generator=generator)
    return numbers.view(torch.uint8).numpy().tobytes()


def _nbytes(shapes: Sequence[Named]) -> int:
    return sum(2 * math.prod(shape) for _, shape in shapes)


def _split(shapes: Sequence[Named], count: int) -> list[list[Named]]:
    """Cut the list into ``count`` runs of about the same number of elements."""
    total = sum(math.prod(shape) for _, shape in shapes)
    result: list[list[Named]] = [[] for _ in range(count)]
    before = 0
    for name, shape in shapes:
        size = math.prod(shape)
        result[min(count - 1, (before + size // 2) * count // total)].append((name, shape))
        before += size
    return [shard for shard in result if shard]
