"""The header of a GGUF file: metadata and tensor table, checked before anything is made of them.

``gguf.GGUFReader`` turns every token of a vocabulary into numpy arrays (seconds, hundreds of MB) and trusts every
length it reads. This parser walks over a vocabulary and keeps its length. Its memory is bounded by the limits below.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final, TypeAlias

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from quantdock import CheckpointError, UnsupportedError

Value: TypeAlias = bool | int | float | str | list[bool | int | float]
"""A metadata value. An array of strings, and any array longer than ``LONGEST_ARRAY``, is given as its length."""

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
ALIGNMENT: Final = 32  # unless general.alignment says otherwise

MOST_ENTRIES: Final = 4096
MOST_TENSORS: Final = 1 << 18
MOST_DIMENSIONS: Final = 4  # as in ggml
LONGEST_NAME: Final = (1 << 16) - 1  # what the specification allows for keys
LONGEST_STRING: Final = 16 << 20
LONGEST_ARRAY: Final = 4096  # what a config needs has a few values per layer; vocabularies are longer

STRING: Final = 8
_ARRAY = 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_UINT32, _UINT64 = struct.Struct("<I"), struct.Struct("<Q")
_COUNTS = struct.Struct("<QQ")
_ARRAY_HEAD = struct.Struct("<IQ")
_TENSOR_TAIL = struct.Struct("<IQ")
_SMALLEST_ENTRY = 8 + 4 + 1  # an empty key, a type, one byte
_SMALLEST_TENSOR = 8 + 4 + 4 + 8  # an empty name, no dimensions, a type, an offset


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """One row of the tensor table."""

    name: str
    shape: tuple[int, ...]
    """Outermost dimension first, as torch writes it (the file has it the other way round)."""
    kind: GGMLQuantizationType
    start: int
    """Byte in the file at which the values begin."""
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a GGUF file says before its first value."""

    file: Path
    metadata: Mapping[str, Value]
    entries: Mapping[str, bytes]
    """Key -> its whole entry as stored, for every key whose value isn't given as a length."""
    tensors: tuple[TensorInfo, ...]
    fingerprint: tuple[int, ...]
    """What tells whether the file is still the one that was parsed."""

    @property
    def architecture(self) -> str:
        """``general.architecture``.

        Raises:
            CheckpointError: there is none.
        """
        found = self.metadata.get("general.architecture")
        if not isinstance(found, str):
            raise CheckpointError("its metadata has no general.architecture, which names the model", file=self.file)
        return found


def read_header(file: Path) -> Header:
    """Parse the header of ``file``; no tensor value is touched.

    Raises:
        CheckpointError: the file isn't GGUF, or it is damaged.
        UnsupportedError: it is a GGUF file of a kind that can't be read here.
    """
    descriptor = open_file(file)
    try:
        return _parse(descriptor, file)
    finally:
        os.close(descriptor)


def open_file(file: Path) -> int:
    """A descriptor for reading.

    Raises:
        CheckpointError: there is none to be had.
    """
    try:
        return os.open(file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        raise CheckpointError(f"can't be opened ({error.strerror})", file=file) from error


def fingerprint_of(descriptor: int) -> tuple[int, ...]:
    """Which file this is, and when it was last written."""
    found = os.fstat(descriptor)
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def _parse(descriptor: int, file: Path) -> Header:
    size = os.fstat(descriptor).st_size
    if size < len(MAGIC) + _UINT32.size + _COUNTS.size:
        raise CheckpointError(f"has {size} bytes, fewer than a GGUF header takes", file=file)
    with mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(data, file)
        _check_version(cursor)
        tensor_count, entry_count = cursor.take(_COUNTS, "the counts")
        cursor.expect_room(entry_count, _SMALLEST_ENTRY, MOST_ENTRIES, "metadata entries")
        metadata: dict[str, Value] = {}
        entries: dict[str, bytes] = {}
        for _ in range(entry_count):
            _read_entry(cursor, metadata, entries)
        cursor.expect_room(tensor_count, _SMALLEST_TENSOR, MOST_TENSORS, "tensors")
        rows = [_read_row(cursor) for _ in range(tensor_count)]
        alignment = _alignment(metadata, file)
        first = -(-cursor.position // alignment) * alignment
    tensors = tuple(_placed(row, first, alignment, size, file) for row in rows)
    _check_disjoint(tensors, file)
    return Header(
        file=file, metadata=metadata, entries=entries, tensors=tensors, fingerprint=fingerprint_of(descriptor)
    )


class _Cursor:
    """A position in a mapped file; whoever takes more than there is gets a ``CheckpointError``."""

    def __init__(self, data: mmap.mmap, file: Path) -> None:
        self.data = data
        self.file = file
        self.size = len(data)
        self.position = 0

    def take(self, layout: struct.Struct, what: str) -> tuple[Any, ...]:
        end = self._end(layout.size, what)
        values = layout.unpack_from(self.data, self.position)
        self.position = end
        return values

    def text(self, what: str, longest: int) -> str:
        (length,) = self.take(_UINT64, what)
        if length > longest:
            raise self.error(f"{what} claims {length} bytes; at most {longest} are read")
        end = self._end(length, what)
        raw = self.data[self.position : end]
        self.position = end
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self.error(f"{what} isn't UTF-8 ({error.reason} at its byte {error.start})") from error

    def skip(self, length: int, what: str) -> None:
        self.position = self._end(length, what)

    def skip_texts(self, count: int, what: str) -> None:
        data, size, position, unpack = self.data, self.size, self.position, _UINT64.unpack_from
        try:
            for _ in range(count):
                position += 8 + unpack(data, position)[0]
        except (struct.error, OverflowError):  # past the end, or past any end
            position = size + 1
        if position > size:
            raise self.truncated(what)
        self.position = position

    def expect_room(self, count: int, smallest: int, most: int, what: str) -> None:
        if count * smallest > self.size - self.position:
            raise self.error(f"claims {count} {what}, more than fit in its {self.size} bytes")
        if count > most:
            raise self.error(f"claims {count} {what}; at most {most} are read")

    def truncated(self, what: str) -> CheckpointError:
        return self.error(f"ends inside {what}, at byte {self.size}: it is truncated or damaged")

    def error(self, message: str) -> CheckpointError:
        return CheckpointError(message, file=self.file)

    def _end(self, length: int, what: str) -> int:
        end = self.position + length
        if end > self.size:
            raise self.truncated(what)
        return end


def _check_version(cursor: _Cursor) -> None:
    if (magic := cursor.data[: len(MAGIC)]) != MAGIC:
        raise cursor.error(f"begins with {magic!r}, not with {MAGIC!r}: it isn't a GGUF file")
    cursor.skip(len(MAGIC), "the magic")
    (version,) = cursor.take(_UINT32, "the version")
    if version in VERSIONS:
        return
    if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
        raise UnsupportedError(f"{cursor.file}: is a big-endian GGUF file; convert it to little-endian")
    raise cursor.error(f"is GGUF version {version}; versions {' and '.join(map(str, VERSIONS))} are read")


def _read_entry(cursor: _Cursor, metadata: dict[str, Value], entries: dict[str, bytes]) -> None:
    start = cursor.position
    key = cursor.text("a metadata key", LONGEST_NAME)
    if key in metadata:
        raise cursor.error(f"has the metadata key {key!r} twice")
    what = f"the metadata value {key!r}"
    (kind,) = cursor.take(_UINT32, what)
    if kind != _ARRAY:
        metadata[key] = _read_single(cursor, kind, what)
        entries[key] = cursor.data[start : cursor.position]
        return
    kind, count = cursor.take(_ARRAY_HEAD, what)
    metadata[key] = value = _read_array(cursor, kind, count, what)
    if isinstance(value, list):
        entries[key] = cursor.data[start : cursor.position]


def _read_single(cursor: _Cursor, kind: int, what: str) -> Value:
    if kind == STRING:
        return cursor.text(what, LONGEST_STRING)
    if kind not in _SCALARS:
        raise cursor.error(f"{what} has the unknown type {kind}")
    (value,) = cursor.take(struct.Struct("<" + _SCALARS[kind]), what)
    found: Value = value
    return found


def _read_array(cursor: _Cursor, kind: int, count: int, what: str) -> Value:
    if kind == _ARRAY:
        raise UnsupportedError(f"{cursor.file}: {what} is an array of arrays, which no known model needs")
    if kind == STRING:
        if count * _UINT64.size > cursor.size - cursor.position:
            raise cursor.truncated(what)
        cursor.skip_texts(count, what)
        return count
    if kind not in _SCALARS:
        raise cursor.error(f"{what} is an array of the unknown type {kind}")
    if count > LONGEST_ARRAY:
        cursor.skip(count * struct.calcsize("<" + _SCALARS[kind]), what)
        return count
    return list(cursor.take(struct.Struct(f"<{count}{_SCALARS[kind]}"), what))


def _read_row(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.text("a tensor name", LONGEST_NAME)
    what = f"the table entry of tensor {name!r}"
    (dimensions,) = cursor.take(_UINT32, what)
    if dimensions > MOST_DIMENSIONS:
        raise CheckpointError(
            f"claims {dimensions} dimensions; GGUF has up to {MOST_DIMENSIONS}", file=cursor.file, tensor=name
        )
    shape = cursor.take(struct.Struct(f"<{dimensions}Q"), what)[::-1]
    kind, offset = cursor.take(_TENSOR_TAIL, what)
    return name, shape, kind, offset


def _alignment(metadata: Mapping[str, Value], file: Path) -> int:
    found = metadata.get("general.alignment", ALIGNMENT)
    if type(found) is not int or found <= 0 or found & (found - 1):
        raise CheckpointError(f"general.alignment is {found!r}, expected a power of two", file=file)
    return found


def _placed(
    row: tuple[str, tuple[int, ...], int, int], first: int, alignment: int, size: int, file: Path
) -> TensorInfo:
    name, shape, number, offset = row

    def error(message: str) -> CheckpointError:
        return CheckpointError(message, file=file, tensor=name)

    try:
        kind = GGMLQuantizationType(number)
    except ValueError as unknown:
        raise error(f"has the unknown tensor type {number}") from unknown
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if block > 1 and (not shape or shape[-1] % block):
        raise error(f"has rows of {shape[-1] if shape else 0} values, but {kind.name} packs {block} at a time")
    if offset % alignment:
        raise error(f"begins at offset {offset}, which isn't a multiple of the alignment {alignment}")
    info = TensorInfo(
        name=name, shape=shape, kind=kind, start=first + offset, nbytes=prod(shape) // block * block_bytes
    )
    if info.start + info.nbytes > size:
        raise error(f"is said to end at byte {info.start + info.nbytes}, but the file has {size} bytes")
    return info


def _check_disjoint(tensors: Iterable[TensorInfo], file: Path) -> None:
    names: set[str] = set()
    previous: TensorInfo | None = None
    for info in sorted(tensors, key=lambda info: (info.start, info.nbytes)):
        if info.name in names:
            raise CheckpointError("is in the tensor table twice", file=file, tensor=info.name)
        names.add(info.name)
        if previous is not None and info.nbytes and previous.start + previous.nbytes > info.start:
            raise CheckpointError(f"overlaps tensor {previous.name!r}", file=file, tensor=info.name)
        previous = info if info.nbytes else previous
