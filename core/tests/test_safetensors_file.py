"""Safetensors files: what upstream writes is read bit for bit, and nothing that isn't valid gets through."""

from __future__ import annotations

import gc
import json
import math
import mmap
import os
import sys
import threading
import time
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from quantdock import pagecache
from quantdock.errors import CheckpointError
from quantdock.safetensors_file import MAX_HEADER_NBYTES, SafetensorsReader, read_header, stored_tensors
from quantdock.tensors import StoredTensor, TensorReader

# A busy machine is no reason to fail.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
linux = pytest.mark.skipif(sys.platform != "linux", reason="advice and accounting of pages are Linux's")

NAMES = """
    float64 float32 float16 bfloat16 complex64 int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool
    float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu float4_e2m1fn_x2
"""
DTYPES = [getattr(torch, name) for name in NAMES.split() if hasattr(torch, name)]


def raw(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor's values, whatever its dtype."""
    if not tensor.numel():
        return b""
    return bytes(tensor.contiguous().flatten().view(torch.uint8).tolist())


def assert_same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert raw(found[name]) == raw(tensor)


def read_all(path: Path) -> dict[str, torch.Tensor]:
    return {tensor.name: tensor.read() for tensor in stored_tensors(read_header(path))}


def write(path: Path, header: Mapping[str, Any] | bytes, data: bytes, *, length: int | None = None) -> Path:
    """A file with this very header, valid or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.unlink(missing_ok=True)  # a new inode: maps of an older file stay whole
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that hypothesis' examples may share."""
    return tmp_path_factory.mktemp("files")


@pytest.fixture
def two(tmp_path: Path) -> Path:
    path = tmp_path / "two.safetensors"
    save_file({"a": torch.arange(1000.0), "b": torch.arange(600, dtype=torch.int16).view(20, 30)}, path)
    return path


# --- what is valid


@st.composite
def state_dicts(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    result = {}
    for name in draw(st.lists(st.text(max_size=20).filter("__metadata__".__ne__), unique=True, max_size=6)):
        dtype = draw(st.sampled_from(DTYPES))
        shape = draw(st.lists(st.integers(0, 5), min_size=int("float4" in str(dtype)), max_size=4))
        count = math.prod(shape)
        values = draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
        if dtype == torch.bool:
            values = bytes(value & 1 for value in values)
        flat = torch.tensor(list(values), dtype=torch.uint8)
        result[name] = flat.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)
    return result


@settings(patient)
@given(
    tensors=state_dicts(), metadata=st.none() | st.dictionaries(st.text(max_size=5), st.text(max_size=5), min_size=1)
)
def test_what_upstream_writes_is_read_bit_for_bit(
    folder: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None
) -> None:
    path = folder / "written.safetensors"
    path.unlink(missing_ok=True)
    save_file(tensors, path, metadata=metadata)
    header = read_header(path)
    assert header.metadata == (metadata or {})
    assert_same(read_all(path), tensors)


def test_tensors_come_in_file_order_with_their_ranges(two: Path) -> None:
    stored = stored_tensors(read_header(two))
    size = two.stat().st_size
    assert [(tensor.name, tensor.offset, tensor.stored_nbytes) for tensor in stored] == [
        ("a", size - 5200, 4000),
        ("b", size - 1200, 1200),
    ]
    data = two.read_bytes()
    for tensor in stored:
        assert data[tensor.offset : tensor.offset + tensor.stored_nbytes] == raw(tensor.read())


def test_four_bit_elements_take_torchs_packed_shape(tmp_path: Path) -> None:
    if not hasattr(torch, "float4_e2m1fn_x2"):
        pytest.skip("this torch has no packed four-bit floats")
    path = write(tmp_path / "x.safetensors", {"w": entry("F4", [2, 6], [0, 6])}, bytes(range(6)))
    tensor = read_all(path)["w"]
    assert (tensor.dtype, tensor.shape) == (torch.float4_e2m1fn_x2, (2, 3))
    assert raw(tensor) == bytes(range(6))
    odd = write(tmp_path / "y.safetensors", {"w": entry("F4", [2, 5], [0, 5])}, bytes(5))
    with pytest.raises(CheckpointError, match="half a byte to a row"):
        read_header(odd)


def test_a_file_without_tensors_is_valid(tmp_path: Path) -> None:
    assert read_all(write(tmp_path / "x.safetensors", {}, b"")) == {}


# --- the map


def reader_of(path: Path) -> tuple[TensorReader, dict[str, StoredTensor]]:
    stored = {tensor.name: tensor for tensor in stored_tensors(read_header(path))}
    return next(iter(stored.values())).reader, stored


def test_views_can_be_written_to_and_the_file_stays_as_it_is(two: Path) -> None:
    before = two.read_bytes()
    reader, stored = reader_of(two)
    assert reader.maps
    view = stored["a"].read()
    assert view.data_ptr() == stored["a"].read().data_ptr()  # no copy
    view.fill_(7)
    assert stored["a"].read()[3] == 7
    reader.close()
    del view
    gc.collect()
    assert two.read_bytes() == before
    assert stored["a"].read()[3] == 3


def test_tensors_outlive_the_reader_and_the_file(two: Path) -> None:
    expected = load_file(two)
    reader, stored = reader_of(two)
    tensors = {name: tensor.read() for name, tensor in stored.items()}
    reader.close()
    reader.close()
    two.unlink()
    del reader, stored
    gc.collect()
    assert_same(tensors, expected)


def test_threads_share_one_map(two: Path) -> None:
    _, stored = reader_of(two)
    barrier = threading.Barrier(8)
    pointers: list[int] = []

    def read() -> None:
        barrier.wait()
        pointers.append(stored["b"].read().data_ptr())

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(pointers) == 8
    assert len(set(pointers)) == 1


@linux
def test_a_map_holds_no_descriptor(two: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    _, stored = reader_of(two)
    tensor = stored["a"].read()
    assert len(os.listdir("/proc/self/fd")) == before
    assert tensor[999] == 999


@linux
def test_a_file_larger_than_memory_can_be_mapped(tmp_path: Path) -> None:
    if Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2":
        pytest.skip("this machine refuses to map more than it could hold")
    swap = sum(int(line.split()[2]) * 1024 for line in Path("/proc/swaps").read_text().splitlines()[1:])
    count = 2 * (os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE + swap)
    path = write(tmp_path / "x.safetensors", {"w": entry("U8", [count], [0, count])}, b"\x05")
    with path.open("r+b") as file:
        try:
            file.truncate(path.stat().st_size - 1 + count)
        except OSError:
            pytest.skip("this file system has no files of that size")
    tensor = read_all(path)["w"]
    assert tensor[:3].tolist() == [5, 0, 0]
    assert tensor[-1] == 0


def resident(tensor: torch.Tensor) -> int:
    """Bytes in memory of the map that holds a tensor, as this process's page tables have them."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        field = line.split()
        if "-" in field[0] and not field[0].endswith(":"):
            start, end = (int(part, 16) for part in field[0].split("-"))
            inside = start <= tensor.data_ptr() < end
        elif inside and field[0] == "Rss:":
            return int(field[1]) * 1024
    raise AssertionError("no such map")


@linux
@pytest.mark.parametrize("transposed", [False, True])
def test_released_pages_leave_memory_and_come_back(tmp_path: Path, transposed: bool) -> None:
    path = tmp_path / "x.safetensors"
    values = torch.arange(1 << 20, dtype=torch.int32).view(1024, 1024)
    save_file({"before": torch.ones(9), "w": values, "z": torch.ones(9)}, path)
    tensor = read_all(path)["w"]
    assert torch.equal(tensor, values)
    assert resident(tensor) >= values.nbytes
    pagecache.release(tensor.t() if transposed else tensor)
    assert resident(tensor) <= 4 * mmap.PAGESIZE
    assert torch.equal(tensor, values)


@linux
def test_dropping_keeps_the_pages_at_the_ends(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.zeros(4 * mmap.PAGESIZE, dtype=torch.uint8)}, path)
    tensor = read_all(path)["w"]
    tensor.fill_(1)  # what is written to and dropped is lost, which shows where pages were dropped
    start = -tensor.data_ptr() % mmap.PAGESIZE  # of the first whole page
    pagecache.drop(tensor.data_ptr() + start - 1, 2 * mmap.PAGESIZE)
    lost = (tensor == 0).nonzero().flatten()
    assert (int(lost[0]), int(lost[-1]) + 1) == (start, start + mmap.PAGESIZE)
    pagecache.drop(tensor.data_ptr() + start + 1, mmap.PAGESIZE)  # no whole page in it
    assert int((tensor == 0).sum()) == mmap.PAGESIZE


def test_reading_ahead_changes_nothing(two: Path) -> None:
    reader, stored = reader_of(two)
    for tensor in stored.values():
        reader.will_need(tensor)
        pagecache.read_ahead(tensor.read())
    assert_same({name: tensor.read() for name, tensor in stored.items()}, load_file(two))
    two.unlink()
    reader.will_need(stored["a"])


@linux
@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system takes no advice about files")
def test_a_cold_file_is_read_ahead(tmp_path: Path) -> None:
    """What isn't in the page cache is by the time that it is needed; what is there is found there."""
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.arange(3 << 20, dtype=torch.int32)}, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        size = path.stat().st_size
        if pagecache.is_cached(file.fileno(), 0, size):
            pytest.skip("the files of this system can't be taken out of the page cache")
        pagecache.prefetch(path, 0, size)
        deadline = time.monotonic() + 60
        while not pagecache.is_cached(file.fileno(), 0, size):
            assert time.monotonic() < deadline, "nothing was read ahead"
            time.sleep(0.01)


@pytest.mark.parametrize("padding", range(8))
def test_misaligned_values_are_copied(tmp_path: Path, padding: int) -> None:
    tensors = {
        "a": torch.arange(5, dtype=torch.uint8),
        "b": torch.arange(300.0),
        "c": torch.ones(1, dtype=torch.uint8),
        "d": torch.ones((), dtype=torch.bfloat16),
    }
    header = {
        "a": entry("U8", [5], [0, 5]),
        "b": entry("F32", [300], [5, 1205]),
        "c": entry("U8", [1], [1205, 1206]),
        "d": entry("BF16", [], [1206, 1208]),
    }
    text = json.dumps(header).encode() + b" " * padding
    path = write(tmp_path / "x.safetensors", text, b"".join(map(raw, tensors.values())))
    reader, stored = reader_of(path)
    assert not reader.maps
    found = {name: tensor.read() for name, tensor in stored.items()}
    assert_same(found, tensors)
    assert all(tensor.data_ptr() % tensor.itemsize == 0 for tensor in found.values())
    assert found["b"].data_ptr() != stored["b"].read().data_ptr()


@pytest.mark.parametrize("misaligned", [False, True])
def test_a_file_that_changed_since_it_was_indexed_is_refused(tmp_path: Path, misaligned: bool) -> None:
    text = json.dumps({"w": entry("F32", [2], [0, 8])}).encode()
    text += b" " * (-len(text) % 8 + misaligned)
    path = write(tmp_path / "x.safetensors", text, bytes(8))
    reader, stored = reader_of(path)
    assert reader.maps != misaligned
    with path.open("r+b") as file:
        file.truncate(len(text) + 8)
    with pytest.raises(CheckpointError, match="changed between being indexed and being read"):
        stored["w"].read()
    path.unlink()
    with pytest.raises(CheckpointError, match="can't be read"):
        stored["w"].read()


# --- what isn't valid

F32 = entry()
LIE = entry("F32", [2**40], [0, 2**42])
INVALID: dict[str, tuple[Any, bytes, str]] = {
    "overlap": ({"a": F32, "b": entry(offsets=[4, 12])}, bytes(12), r"tensor 'b': this and tensor 'a' overlap by 4"),
    "same range": ({"a": F32, "b": F32}, bytes(8), r"tensor 'b': this and tensor 'a' overlap by 8"),
    "hole": ({"a": F32, "b": entry(offsets=[9, 17])}, bytes(17), "a hole of 1 bytes between"),
    "hole at the start": ({"a": entry(offsets=[1, 9])}, bytes(9), "this and the header have a hole of 1 bytes"),
    "surplus": ({"a": F32}, bytes(10), "2 bytes at the end belong to no tensor"),
    "truncated": ({"a": F32, "b": entry(offsets=[8, 16])}, bytes(9), r"tensor 'b'.*: 7 of \S+ bytes are missing"),
    "data that isn't there": ({"a": LIE}, bytes(8), r"4,398,046,511,096 of \S+ bytes are missing"),
    "bytes don't fit the shape": ({"a": entry(shape=[3])}, bytes(8), r"F32 of shape \[3\] takes 12 bytes.* span 8"),
    "empty with bytes": ({"a": entry(shape=[0])}, bytes(8), "takes 0 bytes.* span 8"),
    "shape overflows 64 bits": ({"a": entry(shape=[2**32, 2**32], offsets=[0, 0])}, b"", r"exceeds 2\*\*63"),
    "shape wraps to the right size": ({"a": entry(shape=[2**62 + 2])}, bytes(8), r"exceeds 2\*\*63"),
    "huge dimension beside an empty one": ({"a": entry(shape=[2**62, 0], offsets=[0, 0])}, b"", r"exceeds 2\*\*63"),
    "dimension of many digits": (
        b'{"a":{"dtype":"U8","shape":[1' + b"0" * 5000 + b'],"data_offsets":[0,1]}}', bytes(1), "usable JSON",
    ),
    "a million dimensions": ({"a": entry("U8", [2] * 10**6, [0, 1])}, bytes(1), r"exceeds 2\*\*63"),
    "negative dimensions": ({"a": entry(shape=[-1, -2])}, bytes(8), "-1 in its shape"),
    "minus zero": (b'{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}', b"", "-0.0 in its shape"),
    "float dimension": ({"a": entry(shape=[2.0])}, bytes(8), "2.0 in its shape"),
    "bool dimension": ({"a": entry(shape=[True, 2])}, bytes(8), "True in its shape"),
    "shape is no list": ({"a": entry(shape=2)}, bytes(8), "shape is 2"),
    "backwards offsets": ({"a": entry(offsets=[8, 0])}, bytes(8), r"data_offsets are \[8, 0\]"),
    "negative offset": ({"a": entry(offsets=[-8, 0])}, bytes(8), "data_offsets are"),
    "float offset": ({"a": entry(offsets=[0, 8.0])}, bytes(8), "data_offsets are"),
    "bool offset": ({"a": entry("U8", [1], [False, True])}, bytes(1), "data_offsets are"),
    "three offsets": ({"a": entry(offsets=[0, 4, 8])}, bytes(8), "data_offsets are"),
    "offset beyond 64 bits": ({"a": entry(offsets=[2**70, 2**70 + 8])}, bytes(8), "data_offsets are"),
    "offsets are no list": ({"a": entry(offsets="08")}, bytes(8), "data_offsets are '08'"),
    "unknown dtype": ({"a": entry("F33")}, bytes(8), "dtype is 'F33'; torch .* BF16"),
    "dtype without a torch dtype": ({"a": entry("F6_E2M3", [4], [0, 3])}, bytes(3), "dtype is 'F6_E2M3'"),
    "dtype is a list": ({"a": entry(["F32"])}, bytes(8), r"dtype is \['F32'\]"),  # type: ignore[arg-type]
    "missing field": ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), r"described by \['dtype', 'shape'\]"),
    "extra field": ({"a": {**F32, "code": "x"}}, bytes(8), "described by .*'code'"),
    "tensor is a list": ({"a": [1]}, bytes(8), "described by list"),
    "metadata is a list": ({"__metadata__": []}, b"", "__metadata__ is list"),
    "metadata of numbers": ({"__metadata__": {"x": 1}}, b"", "'x' is int, expected a string"),
    "header is a list": (b"[]", b"", r"starts with b'\['"),
    "space before the header": (b" {}", b"", "starts with b' '"),
    "empty header": (b"", b"", "starts with b''"),
    "broken JSON": (b'{"a": ', b"", "usable JSON"),
    "text after the header": (b"{} x", b"", "usable JSON"),
    "not UTF-8": (b'{"\xff": 1}', b"", "UTF-8"),
    "half a surrogate pair": (b'{"__metadata__": {"\\ud800": ""}}', b"", "usable JSON"),
    "deep nesting": (b'{"a":' + b"[" * 10**6, b"", "nested too deeply"),
    "duplicate tensor": (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        bytes(1), "'a' comes more than once",
    ),
    "duplicate field": (
        b'{"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}', bytes(1), "'dtype' comes more than once",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", INVALID)
def test_invalid_headers_are_refused(tmp_path: Path, case: str) -> None:
    header, data, message = INVALID[case]
    path = write(tmp_path / "x.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert caught.value.file == path
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (2**60, "claims a header of 1,152,921,504,606,846,976 bytes"),
        (2**64 - 1, "claims a header of"),
        (MAX_HEADER_NBYTES + 1, "claims a header of"),
        (MAX_HEADER_NBYTES, "bytes are missing"),
        (1000, "bytes are missing"),
    ],
)
def test_a_header_length_is_no_reason_to_allocate(tmp_path: Path, length: int, message: str) -> None:
    path = write(tmp_path / "x.safetensors", {"a": F32}, bytes(8), length=length)
    if length == MAX_HEADER_NBYTES + 1:
        with path.open("r+b") as file:
            file.truncate(2 * length)  # there would be enough to read
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=message):
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("size", range(8))
def test_a_stub_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(bytes(size))
    with pytest.raises(CheckpointError, match=f"{size} bytes long"):
        read_header(path)


def test_what_is_no_file_of_values_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="can't be read"):
        read_header(tmp_path / "absent.safetensors")
    with pytest.raises(CheckpointError, match="isn't a regular file"):
        read_header(tmp_path)
    pointer = tmp_path / "pointer.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        read_header(pointer)


def test_a_truncated_download_says_how_much_is_missing(two: Path) -> None:
    with two.open("r+b") as file:
        file.truncate(two.stat().st_size - 1234)
    with pytest.raises(CheckpointError, match=r"tensor 'a': .*: 1,234 of \S+ bytes are missing"):
        read_header(two)


def valid_file(folder: Path) -> bytes:
    path = folder / "valid.safetensors"
    save_file(
        {
            "w": torch.arange(6.0).view(2, 3),
            "half": torch.ones(4, dtype=torch.bfloat16),
            "scalar": torch.tensor(3),
            "none": torch.empty(0, 4),
            "bits": torch.tensor([True, False]),
        },
        path,
        metadata={"format": "pt"},
    )
    return path.read_bytes()


def outcome(path: Path) -> dict[str, torch.Tensor] | None:
    """What quantdock reads, ``None`` when it refuses; anything but a refusal with a reason is a failure."""
    tracemalloc.start()
    try:
        found = read_all(path)
    except CheckpointError:
        return None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**20, "kilobytes of header took megabytes"
    return found


def check_against_upstream(path: Path) -> None:
    found = outcome(path)
    if found is None:
        return
    try:
        expected = load_file(path)
    except SafetensorError as error:
        raise AssertionError(f"upstream refuses what was accepted: {error}") from error
    assert_same(found, expected)


@settings(patient, max_examples=400)
@given(data=st.data())
def test_mutated_bytes_are_refused_or_read_as_upstream_reads_them(folder: Path, data: st.DataObject) -> None:
    content = bytearray(valid_file(folder))
    for _ in range(data.draw(st.integers(1, 4))):
        last = len(content) - 1
        position = data.draw(st.integers(0, last) | st.integers(max(0, last - 40), last))
        byte = data.draw(st.integers(0, 255) | st.sampled_from(b'0123456789-.,:[]{}"\\ uetrfn'))
        match data.draw(st.sampled_from(["replace", "replace", "insert", "delete", "cut", "extend"])):
            case "replace":
                content[position] = byte
            case "insert":
                content.insert(position, byte)
            case "delete":
                del content[position]
            case "cut":
                del content[max(position, 9) :]
            case "extend":
                content += bytes([byte])
    path = folder / "mutated.safetensors"
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    check_against_upstream(path)


numbers = st.integers(0, 40) | st.sampled_from(
    [-1, 2**31, 2**32, 2**61, 2**63 - 1, 2**63, 2**64, 2**64 + 8, 1.0, True, None]
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F8_E4M3", "I64", "F4", "F6_E2M3", "f32", ""]),
        "shape": st.lists(numbers, max_size=3),
        "data_offsets": st.lists(numbers, min_size=2, max_size=2) | st.lists(numbers, max_size=3),
    }
)


@st.composite
def plausible(draw: st.DrawFn) -> dict[str, Any]:
    """Headers that are right but for one thing, so that every check is reached."""
    header: dict[str, Any] = {}
    offset = 0
    for name in draw(st.permutations(["a", "b", "c", "d"])):
        dtype, itemsize = draw(st.sampled_from([("F32", 4), ("BF16", 2), ("U8", 1), ("F8_E5M2", 1), ("I64", 8)]))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        end = offset + math.prod(shape) * itemsize
        header[name] = entry(dtype, shape, [offset, end])
        offset = end
    victim = header[draw(st.sampled_from(["a", "b", "c", "d"]))]
    match draw(st.sampled_from(["shape", "offset", "nothing"])):
        case "shape":
            victim["shape"] = [*victim["shape"], draw(numbers)]
        case "offset":
            victim["data_offsets"][draw(st.integers(0, 1))] = draw(numbers)
    return header


@settings(patient, max_examples=400)
@given(
    header=plausible() | st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), entries), size=st.integers(0, 40)
)
def test_made_up_headers_are_refused_or_read_as_upstream_reads_them(
    folder: Path, header: dict[str, Any], size: int
) -> None:
    ends = [item["data_offsets"][-1] for item in header.values() if item["data_offsets"]]
    fitting = [end for end in ends if type(end) is int and 0 <= end < 1000]
    data = bytes(value % 2 for value in range(max(fitting, default=size)))
    check_against_upstream(write(folder / "made_up.safetensors", header, data))


def test_the_reader_takes_only_its_own_tensors(two: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_file({"a": torch.ones(3)}, other)
    stranger = stored_tensors(read_header(other))[0]
    with pytest.raises(AssertionError, match="a tensor of this file"):
        SafetensorsReader(read_header(two)).read(stranger)
