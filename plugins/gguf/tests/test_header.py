"""Headers: read like the library reads them, and refused with file and tensor when they are damaged."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantdock import CheckpointError, ConfigError, UnsupportedError
from quantdock_gguf.config import model_config
from quantdock_gguf.header import LONGEST_ARRAY, read_header
from quantdock_gguf.reader import GGUFTensorReader

U8, I32, F32, STRING, ARRAY, U64 = 0, 5, 6, 8, 9, 10


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str | bytes, kind: int, payload: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + payload


def row(name: str | bytes, dims: Sequence[int], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


ARCHITECTURE = entry("general.architecture", STRING, text("llama"))


def build(
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    entries: Sequence[bytes] = (ARCHITECTURE,),
    rows: Sequence[bytes] = (),
    tensor_count: int | None = None,
    entry_count: int | None = None,
    data: bytes = bytes(256),
) -> bytes:
    counts = (
        len(rows) if tensor_count is None else tensor_count,
        len(entries) if entry_count is None else entry_count,
    )
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(entries) + b"".join(rows)
    return head + bytes(-len(head) % 32) + data


DAMAGED = {
    "empty": (b"", "has 0 bytes"),
    "short": (b"GGUF\3\0\0\0", "has 8 bytes"),
    "magic": (build(magic=b"GGML"), "begins with b'GGML', not with b'GGUF'"),
    "version": (build(version=1), "is GGUF version 1; versions 2 and 3 are read"),
    "no such count of tensors": (build(tensor_count=2**60), "claims 1152921504606846976 tensors, more than fit"),
    "no such count of entries": (build(entry_count=2**60), "metadata entries, more than fit in its"),
    "too many entries": (build(entry_count=5000, data=bytes(200_000)), "claims 5000 metadata entries; at most 4096"),
    "cut in a key": (build()[:50], "ends inside a metadata key, at byte 50"),
    "cut in a value": (build()[:66], "ends inside the metadata value 'general.architecture', at byte 66"),
    "cut before the tensor table": (build(rows=[row("w", [1], 0, 0)])[:80], "claims 1 tensors, more than fit in its"),
    "cut in the tensor table": (build(rows=[row("w", [1], 0, 0)])[:95], "ends inside the table entry of tensor 'w'"),
    "long key": (build(entries=[text(b"k" * 70000)], data=bytes(80_000)), "a metadata key claims 70000 bytes"),
    "huge key": (build(entries=[struct.pack("<Q", 2**63)]), "a metadata key claims 9223372036854775808 bytes"),
    "huge string": (build(entries=[entry("k", STRING, struct.pack("<Q", 2**50))]), "'k' claims 1125899906842624 bytes"),
    "key that is no text": (build(entries=[entry(b"\xff", U8, b"\1")]), "a metadata key isn't UTF-8"),
    "value that is no text": (build(entries=[entry("k", STRING, text(b"\xff"))]), "'k' isn't UTF-8"),
    "key twice": (build(entries=[ARCHITECTURE, ARCHITECTURE]), "has the metadata key 'general.architecture' twice"),
    "unknown value type": (build(entries=[entry("k", 77, b"")]), "'k' has the unknown type 77"),
    "unknown array type": (build(entries=[entry("k", ARRAY, struct.pack("<IQ", 77, 1))]), "array of the unknown type"),
    "huge array": (
        build(entries=[entry("k", ARRAY, struct.pack("<IQ", U64, 2**60))]),
        "ends inside the metadata value",
    ),
    "huge array of strings": (build(entries=[entry("k", ARRAY, struct.pack("<IQ", STRING, 2**60))]), "ends inside"),
    "huge string in an array": (
        build(entries=[entry("k", ARRAY, struct.pack("<IQQ", STRING, 1, 2**60))]),
        "ends inside the metadata value 'k'",
    ),
    "huge string before another": (
        build(entries=[entry("k", ARRAY, struct.pack("<IQQQ", STRING, 2, 2**63, 0))]),
        "ends inside the metadata value 'k'",
    ),
    "alignment": (
        build(entries=[ARCHITECTURE, entry("general.alignment", 4, struct.pack("<I", 24))]),
        "general.alignment is 24, expected a power of two",
    ),
}

DAMAGED_TENSORS = {
    "five dimensions": ([row("w", [1] * 5, 0, 0)], "claims 5 dimensions; GGUF has up to 4"),
    "a billion dimensions": ([text("w") + struct.pack("<I", 10**9) + bytes(64)], "claims 1000000000 dimensions"),
    "unknown type": ([row("w", [4], 199, 0)], "has the unknown tensor type 199"),
    "outside of the file": ([row("w", [64], 0, 256)], "is said to end at byte"),
    "offset of 2**63": ([row("w", [64], 0, 2**63)], "is said to end at byte"),
    "larger than the file": ([row("w", [2**40, 2**40], 0, 0)], "is said to end at byte"),
    "offset between alignments": ([row("w", [4], 0, 8)], "begins at offset 8, which isn't a multiple"),
    "rows that are no blocks": ([row("w", [33], int(Kind.Q8_0), 0)], "has rows of 33 values, but Q8_0 packs 32"),
    "blocks without a row": ([row("w", [], int(Kind.Q8_0), 0)], "has rows of 0 values, but Q8_0 packs 32"),
    "twice": ([row("w", [4], 0, 0), row("w", [4], 0, 32)], "is in the tensor table twice"),
    "overlapping": ([row("v", [16], 0, 0), row("w", [4], 0, 32)], "overlaps tensor 'v'"),
    "one inside of another": ([row("v", [64], 0, 0), row("u", [0], 0, 0), row("w", [4], 0, 64)], "overlaps tensor 'v'"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_header_is_refused(tmp_path, case):
    raw, message = DAMAGED[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert caught.value.file == path


@pytest.mark.parametrize("case", DAMAGED_TENSORS)
def test_a_damaged_tensor_is_refused_by_name(tmp_path, case):
    rows, message = DAMAGED_TENSORS[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(build(rows=rows))
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert message in str(caught.value)
    assert (caught.value.file, caught.value.tensor) == (path, "w")


def test_big_endian_files_and_nested_arrays_are_said_to_be_unsupported(tmp_path):
    path = tmp_path / "other.gguf"
    path.write_bytes(build(version=3 << 24))
    with pytest.raises(UnsupportedError, match=r"other\.gguf: is a big-endian GGUF file"):
        read_header(path)
    path.write_bytes(build(entries=[entry("k", ARRAY, struct.pack("<IQ", ARRAY, 1))]))
    with pytest.raises(UnsupportedError, match="array of arrays"):
        read_header(path)


def test_a_file_without_architecture_says_so(tmp_path):
    path = tmp_path / "none.gguf"
    path.write_bytes(build(entries=[]))
    with pytest.raises(CheckpointError, match=r"no general\.architecture"):
        read_header(path).architecture  # noqa: B018


def test_vocabularies_are_counted_and_not_kept(tmp_path):
    """A header of 1.2 MB must not take more than a fraction of that."""
    path = tmp_path / "vocabulary.gguf"
    tokens = struct.pack("<IQ", STRING, 10**5) + text("word") * 10**5
    scores = struct.pack("<IQ", I32, LONGEST_ARRAY + 1) + bytes(4 * (LONGEST_ARRAY + 1))
    path.write_bytes(build(entries=[entry("tokens", ARRAY, tokens), entry("scores", ARRAY, scores)]))
    tracemalloc.start()
    try:
        header = read_header(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert header.metadata == {"tokens": 10**5, "scores": LONGEST_ARRAY + 1}
    assert header.entries == {}
    assert peak < 50_000


def test_the_library_reads_the_same(tiny_llama):
    header, library = read_header(tiny_llama), gguf.GGUFReader(tiny_llama)
    assert header.architecture == "llama"
    expected = {key: field.contents() for key, field in library.fields.items() if not key.startswith("GGUF.")}
    expected["tokenizer.ggml.tokens"] = len(expected["tokenizer.ggml.tokens"])
    assert header.metadata == expected
    assert [(info.name, info.shape[::-1], info.kind, info.start, info.nbytes) for info in header.tensors] == [
        (tensor.name, tuple(tensor.shape.tolist()), tensor.tensor_type, tensor.data_offset, tensor.n_bytes)
        for tensor in library.tensors
    ]


def test_another_alignment_is_followed(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "aligned.gguf", "llama")
    writer.add_custom_alignment(256)
    values = {"a": np.arange(3, dtype=np.float32), "b": np.arange(5, dtype=np.float32)}
    for name, array in values.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    reader = GGUFTensorReader(read_header(tmp_path / "aligned.gguf"))
    assert {tensor.name: tensor.read().tolist() for tensor in reader.tensors()} == {
        name: array.tolist() for name, array in values.items()
    }


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("mutants") / "mutant.gguf"


MUTABLE = build(
    entries=[
        ARCHITECTURE,
        entry("llama.block_count", 4, struct.pack("<I", 1)),
        entry("llama.attention.head_count", 4, struct.pack("<I", 2)),
        entry("llama.rope.freq_base", F32, struct.pack("<f", 1e4)),
        entry("general.alignment", 4, struct.pack("<I", 32)),
        entry("tokenizer.ggml.tokens", ARRAY, struct.pack("<IQ", STRING, 3) + text("a") + text("bc") + text("d")),
        entry("tokenizer.ggml.token_type", ARRAY, struct.pack("<IQ3i", I32, 3, 1, 2, 3)),
    ],
    rows=[row("token_embd.weight", [32, 3], int(Kind.Q8_0), 0), row("output_norm.weight", [2, 2], 0, 128)],
    data=bytes(range(144)),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(st.tuples(st.integers(0, len(MUTABLE) - 145), st.integers(0, 255)), max_size=4),
    length=st.one_of(st.none(), st.integers(0, len(MUTABLE))),
)
def test_whatever_is_changed_in_a_header_it_is_refused_or_every_value_is_in_the_file(scratch, changes, length):
    raw = bytearray(MUTABLE)
    for place, value in changes:
        raw[place] = value
    scratch.write_bytes(raw[:length])
    values, refused = [], ""
    try:
        reader = GGUFTensorReader(read_header(scratch))
        values = [(tensor, tensor.read()) for tensor in reader.tensors()]
    except (CheckpointError, UnsupportedError) as error:
        refused = str(error)
    assert bool(refused) == (str(scratch) in refused)
    for tensor, value in values:
        assert tuple(value.shape) == tensor.spec.shape
        assert tensor.offset + tensor.stored_nbytes <= len(raw[:length])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(24, len(MUTABLE) - 145), st.integers(0, 255)), min_size=1, max_size=3))
def test_whatever_is_changed_in_the_metadata_it_is_refused_or_gives_a_config(scratch, changes):
    raw = bytearray(MUTABLE)
    for place, value in changes:
        raw[place] = value
    scratch.write_bytes(raw)
    config, refused = None, ""
    try:
        config = model_config([read_header(scratch)])
    except (CheckpointError, ConfigError, UnsupportedError) as error:
        refused = str(error)
    assert (str(scratch) in refused) == (config is None)
