"""Safetensors files, read without trusting a byte of them.

The format, as the safetensors project describes and enforces it: 8 bytes with the length of the header (little-endian),
the header (a JSON object: tensor name to dtype, shape and a pair of byte offsets, plus an optional ``__metadata__`` of
strings), and the values. Offsets count from the end of the header; the tensors follow one another without a gap or an
overlap and fill the file to its end.
"""

from __future__ import annotations

import functools
import json
import operator
import os
import stat
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from quantdock import pagecache
from quantdock.errors import CheckpointError, UnsupportedError
from quantdock.tensors import StoredTensor, TensorReader, TensorSpec

MAX_HEADER_NBYTES = 100_000_000
"""The longest header that is parsed, the same as upstream's; bounds the memory that a hostile file can take."""

_MAX_NBYTES = 2**63 - 1
_PROBES = 16
"""Places of a range that are looked at for whether the page cache has it."""
_METADATA = "__metadata__"
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
_INTEGERS = {int}
_KEPT_RANK = 8  # a header can claim millions of dimensions, which nothing should remember
_PACKED = "F4"  # two elements to a byte; torch's shape counts the bytes
_TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64",
    "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn", "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu", _PACKED: "float4_e2m1fn_x2",
}  # fmt: skip
_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, torch_name) for name, torch_name in _TORCH_NAMES.items() if hasattr(torch, torch_name)
}


class SafetensorsEntry(NamedTuple):
    """One tensor of a header that has been validated."""

    name: str
    spec: TensorSpec
    offset: int
    """Of the values, in bytes from the start of the file."""
    nbytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SafetensorsHeader:
    """What ``read_header`` found; every rule of the format holds."""

    file: Path
    entries: tuple[SafetensorsEntry, ...]
    """In the order of their offsets."""
    metadata: Mapping[str, str]
    stamp: tuple[int, int, int]
    """Size in bytes, time of change in nanoseconds and inode of the file that was read."""


def read_header(path: Path) -> SafetensorsHeader:
    """Read and validate the header of a safetensors file.

    No more is read or allocated than the header needs, whatever sizes it claims.

    Raises:
        CheckpointError: the file can't be read, or breaks a rule of the format; says what was found and expected.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError("isn't a regular file", file=path)
        with path.open("rb") as file:
            text, start = _header_text(file, path)
            stamp = _stamp(file)
    except OSError as error:
        raise CheckpointError(f"can't be read ({error.strerror})", file=path) from error
    header = _parse(text, path)
    metadata = _metadata(header.pop(_METADATA, {}), path)
    entries = [_entry(name, raw, start, path) for name, raw in header.items()]
    entries.sort(key=operator.attrgetter("offset", "nbytes"))
    _check_cover(entries, start, stamp[0], path)
    return SafetensorsHeader(file=path, entries=tuple(entries), metadata=metadata, stamp=stamp)


def _stamp(file: BinaryIO) -> tuple[int, int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns, status.st_ino


def _header_text(file: BinaryIO, path: Path) -> tuple[str, int]:
    """The header, and the offset in the file at which the values start."""
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    if len(prefix) < 8:
        raise CheckpointError(f"{size} bytes long; a safetensors file starts with the 8 bytes of a length", file=path)
    if prefix == b"version ":
        raise CheckpointError("a Git LFS pointer instead of the file itself; run `git lfs pull`", file=path)
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_NBYTES:
        raise CheckpointError(
            f"claims a header of {length:,} bytes, the most that is allowed is {MAX_HEADER_NBYTES:,}; "
            "either damaged or not a safetensors file",
            file=path,
        )
    if length > size - 8:
        raise CheckpointError(
            f"the header takes {length:,} bytes, but only {size - 8:,} follow its length: "
            f"at least {length - (size - 8):,} bytes are missing; download it again",
            file=path,
        )
    header = file.read(length)
    if len(header) != length:
        raise CheckpointError("got shorter while it was being read", file=path)
    if not header.startswith(b"{"):
        raise CheckpointError(f"the header starts with {header[:1]!r}, expected b'{{'", file=path)
    try:
        return header.decode(), 8 + length
    except UnicodeDecodeError as error:
        raise CheckpointError(f"the header isn't UTF-8 ({error})", file=path) from error


def unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For ``object_pairs_hook``: JSON objects in which no name comes twice, where Python would let the last one win.

    Raises:
        ValueError: one does.
    """
    result = dict(pairs)
    if len(result) != len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{twice!r} comes more than once")
    return result


def strict_json(text: str, *, parse_int: Callable[[str], Any] = int) -> Any:
    """The JSON value that ``text`` holds, in which no object has a name twice.

    Raises:
        ValueError: it isn't JSON, or an object has one.
        RecursionError: it is nested too deeply.
    """
    value = json.loads(text, parse_int=parse_int)
    # A colon stands behind every name, and maybe in strings: no more colons than names that are left means that none
    # was lost. Only two levels are counted, which is what large files of the ecosystem have.
    objects = [value, *value.values()] if isinstance(value, dict) else []
    if text.count(":") == sum(len(item) for item in objects if isinstance(item, dict)):
        return value
    del value, objects
    return json.loads(text, parse_int=parse_int, object_pairs_hook=unique_object)


def _whole(digits: str) -> int | float:
    """For ``parse_int``: a minus sign makes no integer here, not even of -0."""
    return float(digits) if digits.startswith("-") else int(digits)


def _parse(text: str, path: Path) -> dict[str, Any]:
    """The header as an object; what Python's JSON allows and the format doesn't is refused."""
    try:
        header = strict_json(text, parse_int=_whole if "-0" in text else int)
        if "\\u" in text:
            json.dumps(header, ensure_ascii=False).encode()  # raises for half a surrogate pair
    except RecursionError as error:
        raise CheckpointError("the header is nested too deeply", file=path) from error
    except ValueError as error:
        raise CheckpointError(f"the header isn't usable JSON ({error})", file=path) from error
    assert isinstance(header, dict), "text that starts with a brace"
    return header


def _metadata(raw: object, path: Path) -> dict[str, str]:
    if not isinstance(raw, dict):
        raise CheckpointError(f"{_METADATA} is {type(raw).__name__}, expected an object of strings", file=path)
    for name, value in raw.items():
        if not isinstance(value, str):
            raise CheckpointError(f"{_METADATA}: {name!r} is {type(value).__name__}, expected a string", file=path)
    return raw


def _entry(name: str, raw: object, start: int, path: Path) -> SafetensorsEntry:
    """One validated tensor; that the tensors fill the file together is ``_check_cover``'s business."""
    if not isinstance(raw, dict) or raw.keys() != _ENTRY_KEYS:
        found = sorted(raw) if isinstance(raw, dict) else type(raw).__name__
        raise CheckpointError(
            f"described by {found!s:.200}, expected dtype, shape and data_offsets", file=path, tensor=name
        )
    begin, end = _offsets(raw["data_offsets"], path, name)
    spec, nbytes = _spec(raw["dtype"], raw["shape"], path, name)
    if nbytes != end - begin:
        raise CheckpointError(
            f"{raw['dtype']} of shape {raw['shape']!r:.200} takes {nbytes:,} bytes, "
            f"but data_offsets [{begin}, {end}] span {end - begin:,}",
            file=path,
            tensor=name,
        )
    return SafetensorsEntry(name, spec, start + begin, nbytes)


def _offsets(value: Any, path: Path, tensor: str) -> tuple[int, int]:
    if isinstance(value, list) and len(value) == 2:
        begin, end = value
        if type(begin) is int and type(end) is int and 0 <= begin <= end <= _MAX_NBYTES:
            return begin, end
    raise CheckpointError(
        f"data_offsets are {value!r:.200}, expected two integers [begin, end] with 0 <= begin <= end < 2**63",
        file=path,
        tensor=tensor,
    )


def _spec(name: object, shape: Any, path: Path, tensor: str) -> tuple[TensorSpec, int]:
    """Dtype and shape as torch has them, and the bytes they take."""
    if not isinstance(name, str) or name not in _DTYPES:
        known = f"torch {torch.__version__} and quantdock know {', '.join(_DTYPES)}"
        raise CheckpointError(f"dtype is {name!r:.200}; {known}", file=path, tensor=tensor)
    if not isinstance(shape, list):
        raise CheckpointError(f"shape is {shape!r:.200}, expected a list", file=path, tensor=tensor)
    try:
        if set(map(type, shape)) <= _INTEGERS:  # before the cache is asked, to which 1, 1.0 and True are the same
            make = _known_spec if len(shape) <= _KEPT_RANK else _known_spec.__wrapped__
            return make(name, tuple(shape))
        odd = next(size for size in shape if type(size) is not int)
        raise ValueError(f"{odd!r:.200} in its shape, expected an integer that isn't negative")
    except ValueError as error:
        raise CheckpointError(str(error), file=path, tensor=tensor) from None


@functools.lru_cache(maxsize=4096)
def _known_spec(name: str, shape: tuple[int, ...]) -> tuple[TensorSpec, int]:
    """Made once for all tensors of one dtype and shape; a model has few.

    An empty dimension doesn't excuse the others: torch computes strides from all of them, and those can overflow.

    Raises:
        ValueError: there can be no such tensor.
    """
    extent = _DTYPES[name].itemsize
    for size in shape:
        if size < 0:
            raise ValueError(f"{size!r:.200} in its shape, expected an integer that isn't negative")
        extent *= size or 1
        if extent > _MAX_NBYTES:
            raise ValueError(f"{name} of shape {list(shape)!r:.200} exceeds 2**63 bytes")
    if name == _PACKED:
        if not shape or shape[-1] % 2:
            raise ValueError(f"{name} of shape {list(shape)!r:.200} has half a byte to a row")
        shape = (*shape[:-1], shape[-1] // 2)
    spec = TensorSpec(dtype=_DTYPES[name], shape=shape)
    return spec, spec.nbytes


def _check_cover(entries: list[SafetensorsEntry], start: int, size: int, path: Path) -> None:
    """The tensors follow one another from the end of the header to the end of the file."""
    position, gap_at = start, None
    for index, (_, _, offset, nbytes) in enumerate(entries):
        if offset != position:
            gap_at = index
            break
        position += nbytes
    if gap_at is None and position == size:
        return
    outside = next((entry for entry in entries if entry.offset + entry.nbytes > size), None)
    if outside is not None and start + sum(entry.nbytes for entry in entries) <= size:  # else the file was cut short
        end = outside.offset + outside.nbytes
        raise CheckpointError(
            f"its offsets lead out of the file: it would end at byte {end:,} of {size:,}",
            file=path,
            tensor=outside.name,
        )
    if gap_at is not None:
        previous = f"tensor {entries[gap_at - 1].name!r}" if gap_at else "the header"
        gap = entries[gap_at].offset - position
        problem = f"overlap by {-gap:,} bytes" if gap < 0 else f"have a hole of {gap:,} bytes between them"
        raise CheckpointError(f"this and {previous} {problem}", file=path, tensor=entries[gap_at].name)
    if outside is not None:
        raise CheckpointError(
            f"the file ends in or before this tensor: {position - size:,} of {position:,} bytes are missing; "
            "download it again",
            file=path,
            tensor=outside.name,
        )
    raise CheckpointError(f"{size - position:,} bytes at the end belong to no tensor", file=path)


def stored_tensors(header: SafetensorsHeader) -> list[StoredTensor]:
    """Every tensor of a file in the order of their offsets, all with one reader."""
    reader = SafetensorsReader(header)
    return [
        StoredTensor(name=name, spec=spec, file=header.file, offset=offset, stored_nbytes=nbytes, reader=reader)
        for name, spec, offset, nbytes in header.entries
    ]


class SafetensorsReader(TensorReader):
    """Views of one private map of the file, made when the first tensor is read.

    Values that don't start at a multiple of their item size can't be viewed: compiled kernels assume aligned items,
    and some of them crash on others. Upstream aligns everything; a file in which anything is misaligned is read into
    memory tensor by tensor instead, and ``maps`` is false.
    """

    def __init__(self, header: SafetensorsHeader) -> None:
        if sys.byteorder != "little":
            raise UnsupportedError("safetensors files hold little-endian values; this machine is big-endian")
        self._file = header.file
        self._stamp = header.stamp
        self._aligned = all(offset % spec.dtype.itemsize == 0 for _, spec, offset, nbytes in header.entries if nbytes)
        self._lock = threading.Lock()
        self._map: memoryview | None = None

    @property
    def maps(self) -> bool:
        return self._aligned

    def read(self, tensor: StoredTensor) -> torch.Tensor:
        """The values of ``tensor``.

        Raises:
            CheckpointError: the file is gone, can't be mapped, or isn't the one whose header was read.
        """
        spec, count = tensor.spec, tensor.spec.numel
        assert tensor.file is self._file or tensor.file == self._file, "a tensor of this file"
        assert tensor.offset + count * spec.dtype.itemsize <= self._stamp[0], "a tensor inside the file"
        if not count:
            return torch.empty(spec.shape, dtype=spec.dtype)
        if self._aligned:
            flat = torch.frombuffer(self._map or self._mapped(), dtype=spec.dtype, count=count, offset=tensor.offset)
        else:
            flat = self._copied(tensor).view(spec.dtype)
        return flat.view(spec.shape)

    def will_need(self, tensor: StoredTensor, start: int = 0, nbytes: int | None = None) -> None:
        left = tensor.stored_nbytes - start
        pagecache.prefetch(self._file, tensor.offset + start, left if nbytes is None else min(left, nbytes))

    def populator(self, start: int, stop: int) -> Callable[[], None] | None:
        if not self._aligned or stop <= start:
            return None
        with self._opened() as file:
            cached = pagecache.is_cached(file.fileno(), start, stop - start, places=_PROBES)
        return functools.partial(pagecache.populate, self._mapped(), start, stop) if cached else None

    def close(self) -> None:
        """Let go of the map; it lasts as long as a tensor that was read from it. Reading again makes a new one."""
        with self._lock:
            self._map = None

    def _mapped(self) -> memoryview:
        with self._lock:
            if self._map is None:
                with self._opened() as file:
                    self._map = pagecache.map_private(file.fileno(), self._stamp[0])
            return self._map

    def _copied(self, tensor: StoredTensor) -> torch.Tensor:
        result = torch.empty(tensor.spec.nbytes, dtype=torch.uint8)
        left = result.numpy().data
        with self._opened() as file:
            file.seek(tensor.offset)
            while left:
                count = file.readinto(left)  # type: ignore[attr-defined]  # typeshed's BinaryIO lacks it
                if not count:
                    raise CheckpointError("got shorter while it was being read", file=tensor.file, tensor=tensor.name)
                left = left[count:]
        return result

    @contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        """The file, after a look at whether it is still the one that was validated."""
        path = self._file
        try:
            with path.open("rb") as file:
                if _stamp(file) != self._stamp:
                    raise CheckpointError("changed between being indexed and being read; load again", file=path)
                yield file
        except OSError as error:
            raise CheckpointError(f"can't be read ({error.strerror})", file=path) from error
