"""Core's answer to ``find_checkpoints``: safetensors files, single or sharded, and pickles for those who ask.

File names are the ecosystem's: ``model.safetensors``, or ``model.safetensors.index.json``, whose ``weight_map`` says
which shard has which tensor. A variant stands before the last suffix: ``model.fp16.safetensors``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from quantdock.checkpoint import Checkpoint
from quantdock.errors import CheckpointError
from quantdock.garbage import collected_later
from quantdock.pickle_file import PickleReader
from quantdock.safetensors_file import read_header, stored_tensors, strict_json
from quantdock.tensors import StoredTensor

_MAX_INDEX_NBYTES = 100_000_000
_SHOWN = 20
_ON_REQUEST = (
    "pickles can carry code, so they are read only when asked for: pass use_safetensors=False "
    "(nothing in them is executed even then), or convert them to safetensors"
)


class Files(Protocol):
    """What this module needs of a source."""

    @property
    def name(self) -> str:
        """What the user named, for messages."""

    @property
    def single_file(self) -> Path | None:
        """The weight file, when the user named one instead of a folder or repository."""

    def find(self, name: str) -> Path | None:
        """Local path of one file, ``None`` when the source doesn't have it."""

    def fetch(self, names: Sequence[str]) -> dict[str, Path]:
        """Local paths of several files; those that the source doesn't have are absent."""

    def is_inside(self, path: Path) -> bool:
        """Whether ``path``, links followed, is a file that this source may use."""

    def listing(self) -> list[str]:
        """Names of the source's files, for messages; nothing is downloaded."""


@dataclass(frozen=True, kw_only=True)
class _Format:
    name: str
    suffixes: tuple[str, ...]
    """Of a file that a user may name, and of the shards of an index."""
    single: str
    index: str

    def names(self, variant: str | None) -> tuple[str, str]:
        """File names of a single file and of an index."""
        return _with_variant(self.single, variant), _with_variant(self.index, variant)

    def variants(self, listing: Sequence[str]) -> list[str]:
        """Variants that a source has in this format."""
        found = set()
        for name in (self.single, self.index):
            head, _, suffix = name.rpartition(".")
            pattern = re.compile(rf"{re.escape(head)}\.(.+)\.{re.escape(suffix)}")
            found |= {match[1] for file in listing if (match := pattern.fullmatch(file)) and "-of-" not in file}
        return sorted(found)


_SAFETENSORS = _Format(
    name="safetensors",
    suffixes=(".safetensors",),
    single="model.safetensors",
    index="model.safetensors.index.json",
)
_PICKLE = _Format(
    name="pickle",
    suffixes=(".bin", ".pt", ".pth"),
    single="pytorch_model.bin",
    index="pytorch_model.bin.index.json",
)


def _with_variant(name: str, variant: str | None) -> str:
    head, _, suffix = name.rpartition(".")
    return name if variant is None else f"{head}.{variant}.{suffix}"


@collected_later()
def find_checkpoint(source: Files, *, variant: str | None, use_safetensors: bool) -> Checkpoint:
    """Index the weight files of a source from their headers.

    Args:
        source: where they are.
        variant: of the file names, such as ``fp16``.
        use_safetensors: look for safetensors; if false, look for pickles instead.

    Raises:
        CheckpointError: there is nothing of the kind that was asked for, or it is damaged, incomplete or hostile.
    """
    if source.single_file is not None:
        return _named_file(source.single_file, variant, use_safetensors)
    kind = _SAFETENSORS if use_safetensors else _PICKLE
    if variant is not None and not re.fullmatch(r"[\w-]+(\.[\w-]+)*", variant):
        raise CheckpointError(f"variant={variant!r} can't be part of a file name", file=source.name)
    single, index = kind.names(variant)
    if (path := source.find(single)) is not None:
        _check_inside(source, {single: path})
        return _checkpoint(kind, {single: path}, None)
    if (path := source.find(index)) is not None:
        _check_inside(source, {index: path})
        weight_map = _read_index(path, kind)
        return _checkpoint(kind, _shards(source, weight_map, path), weight_map, path)
    raise CheckpointError(_nothing_found(source, kind, variant), file=source.name)


def _named_file(file: Path, variant: str | None, use_safetensors: bool) -> Checkpoint:
    if variant is not None:
        raise CheckpointError(f"variant={variant!r} chooses among a folder's files, but one file is named", file=file)
    for kind in (_SAFETENSORS, _PICKLE):
        if file.suffix in kind.suffixes:
            if kind is _PICKLE and use_safetensors:
                raise CheckpointError(f"is a pickle; {_ON_REQUEST}", file=file)
            return _checkpoint(kind, {file.name: file}, None)
    known = ", ".join(_SAFETENSORS.suffixes + _PICKLE.suffixes)
    raise CheckpointError(
        f"no installed plugin reads files ending in {file.suffix!r}; quantdock itself reads {known}", file=file
    )


def _nothing_found(source: Files, kind: _Format, variant: str | None) -> str:
    """What was looked for, what there is instead, and how to get that."""
    single, index = kind.names(variant)
    listing = source.listing()
    hints = []
    choices = [f"variant={found!r}" for found in kind.variants(listing)]
    if variant is not None and any(name in listing for name in kind.names(None)):
        choices.append("no variant")
    if choices:
        hints.append(f"it can be loaded with {' or '.join(choices)}")
    other = _PICKLE if kind is _SAFETENSORS else _SAFETENSORS
    if others := [name for name in other.names(variant) if name in listing]:
        advice = _ON_REQUEST if other is _PICKLE else "leave use_safetensors at True to read it"
        hints.append(f"it has {' and '.join(others)}; {advice}")
    if not hints and (named := [file for file in listing if file.endswith(kind.suffixes)]):
        hints.append(f"it has {_listed(named)}; to load one of them, name its local path")
    return "; ".join([f"has neither {single} nor {index}", *hints])


def _read_index(path: Path, kind: _Format) -> dict[str, str]:
    """The ``weight_map`` of an index, tensor name to shard name, with every shard name harmless."""
    try:
        if (size := path.stat().st_size) > _MAX_INDEX_NBYTES:
            raise CheckpointError(f"an index of {size:,} bytes; at most {_MAX_INDEX_NBYTES:,} are read", file=path)
        raw = path.read_bytes()
        index = strict_json(raw.decode(json.detect_encoding(raw)))
    except RecursionError as error:
        raise CheckpointError("nested too deeply", file=path) from error
    except ValueError as error:
        raise CheckpointError(f"not usable JSON ({error})", file=path) from error
    except OSError as error:
        raise CheckpointError(f"can't be read ({error.strerror})", file=path) from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("has no weight_map, expected an object of tensor names to file names", file=path)
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str):
            raise CheckpointError(f"is in {shard!r:.200}, expected the name of a file", file=path, tensor=tensor)
    for shard in set(weight_map.values()):
        _check_shard_name(shard, kind, path)
    return weight_map


def _check_shard_name(shard: str, kind: _Format, index: Path) -> None:
    """Raise unless ``shard`` is a plain path below its folder on every operating system."""
    parts = shard.split("/")
    harmless = not any(part in ("", ".", "..") for part in parts) and not re.search(
        r"[\\:\x00-\x1f\x7f\ud800-\udfff]", shard
    )
    if not harmless:
        raise CheckpointError(f"names the file {shard!r:.200}, expected a plain path inside the source", file=index)
    if not shard.endswith(kind.suffixes):
        raise CheckpointError(f"names the file {shard!r:.200}, expected it to end in {kind.suffixes[0]}", file=index)


def _shards(source: Files, weight_map: Mapping[str, str], index: Path) -> dict[str, Path]:
    """Local paths of all shards, by name."""
    names = sorted(set(weight_map.values()))
    paths = source.fetch(names)
    missing = [name for name in names if name not in paths]
    if missing:
        raise CheckpointError(
            f"{len(missing)} of {len(names)} files it names are missing: {_listed(missing)}; finish the download",
            file=index,
        )
    shards = {name: paths[name] for name in names}
    _check_inside(source, shards)
    return shards


def _check_inside(source: Files, paths: Mapping[str, Path]) -> None:
    outside = [f"{name} ({path.resolve()})" for name, path in paths.items() if not source.is_inside(path)]
    if outside:
        raise CheckpointError(
            f"links lead out of it: {_listed(outside)}. Load from the folder that really has the files",
            file=source.name,
        )


def _checkpoint(
    kind: _Format, files: Mapping[str, Path], weight_map: Mapping[str, str] | None, index: Path | None = None
) -> Checkpoint:
    """Open ``files`` in the order of their names, and check them against the index if there is one."""
    tensors: dict[str, StoredTensor] = {}
    metadata: dict[str, str] = {}
    problems: list[str] = []
    expected: dict[str, set[str]] = {}
    for tensor, shard in (weight_map or {}).items():
        expected.setdefault(shard, set()).add(tensor)
    for name, path in files.items():
        stored, own = _open(kind, path)
        metadata = {**own, **metadata}  # where files differ, the first one counts
        found = {tensor.name: tensor for tensor in stored}
        if weight_map is not None and found.keys() != expected[name]:
            problems += _differences(name, found.keys(), expected[name], weight_map)
        tensors |= found
    if problems:
        raise CheckpointError(f"doesn't agree with the files it names: {_listed(problems)}", file=index)
    return Checkpoint(format=kind.name, files=tuple(files.values()), tensors=tensors, metadata=metadata)


def _open(kind: _Format, path: Path) -> tuple[Iterable[StoredTensor], Mapping[str, str]]:
    if kind is _PICKLE:
        return PickleReader(path).tensors(), {}
    header = read_header(path)
    return stored_tensors(header), header.metadata


def _differences(shard: str, found: Set[str], expected: Set[str], weight_map: Mapping[str, str]) -> list[str]:
    missing = [f"{tensor!r} isn't in {shard}" for tensor in sorted(expected - found)]
    extra = [
        f"{tensor!r} is in {shard}, "
        + (f"but should be in {weight_map[tensor]}" if tensor in weight_map else "but isn't named")
        for tensor in sorted(found - expected)
    ]
    return missing + extra


def _listed(items: Sequence[str]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more
