"""Values: every type that gguf unpacks, bit for bit, in bounded memory."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind

from quantdock import CheckpointError, UnsupportedError
from quantdock_gguf import reader as reader_module
from quantdock_gguf.header import read_header
from quantdock_gguf.reader import GGUFTensorReader

PACKED = [
    kind
    for kind in GGML_QUANT_SIZES
    if kind.name.startswith(("Q", "IQ", "TQ", "MXFP", "NVFP")) and kind.name not in ("Q8_1", "Q8_K", "Q1_0")
]
PLAIN = {
    Kind.F32: (np.float32, torch.float32),
    Kind.F16: (np.float16, torch.float16),
    Kind.F64: (np.float64, torch.float64),
    Kind.I8: (np.int8, torch.int8),
    Kind.I16: (np.int16, torch.int16),
    Kind.I32: (np.int32, torch.int32),
    Kind.I64: (np.int64, torch.int64),
}
QUANTIZABLE = [Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0, Kind.TQ1_0, Kind.TQ2_0, Kind.MXFP4]


def random_blocks(kind: Kind, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Blocks of any bits at all, infinite and NaN scales among them."""
    block, block_bytes = GGML_QUANT_SIZES[kind]
    raw_shape = (*shape[:-1], shape[-1] // block * block_bytes)
    return np.random.default_rng(seed).integers(0, 256, raw_shape, dtype=np.uint8)


def expected(raw: np.ndarray, kind: Kind) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.dequantize(raw, kind)


def same_bits(values: torch.Tensor, wanted: np.ndarray) -> bool:
    """Equal bit by bit; of a NaN, that it is one."""
    found = values.numpy()
    nan = np.isnan(wanted)
    return (
        found.shape == wanted.shape
        and found.dtype == wanted.dtype == np.float32
        and np.array_equal(np.isnan(found), nan)
        and np.array_equal(found.view(np.uint32)[~nan], wanted.view(np.uint32)[~nan])
    )


def write_one(write_gguf, path: Path, kind: Kind, array: np.ndarray, **options) -> GGUFTensorReader:
    file = write_gguf(path / "one.gguf", "llama", {}, {"w.weight": (array, kind)})
    return GGUFTensorReader(read_header(file), **options)


@pytest.mark.parametrize("kind", QUANTIZABLE, ids=lambda kind: kind.name)
def test_quantized_values_are_those_of_gguf(write_gguf, tmp_path, kind):
    values = np.random.default_rng(1).standard_normal((3, 5, 512), dtype=np.float32)
    reader = write_one(write_gguf, tmp_path, kind, values)
    (tensor,) = reader.tensors()
    assert tensor.spec.shape == (3, 5, 512)
    assert same_bits(tensor.read().float(), expected(gguf.quantize(values, kind), kind))


@pytest.mark.parametrize("kind", PACKED, ids=lambda kind: kind.name)
@pytest.mark.parametrize("chunk", [256, 1 << 17])
def test_any_bits_are_unpacked_as_gguf_does_whatever_the_chunk(write_gguf, tmp_path, monkeypatch, kind, chunk):
    monkeypatch.setattr(reader_module, "CHUNK", chunk)
    raw = random_blocks(kind, (21, 768))
    reader = write_one(write_gguf, tmp_path, kind, raw)
    (tensor,) = reader.tensors()
    assert tensor.stored_nbytes == raw.nbytes
    assert tensor.spec.dtype == torch.float32
    assert same_bits(tensor.read(), expected(raw, kind))


@pytest.mark.parametrize("kind", PLAIN, ids=lambda kind: kind.name)
def test_plain_types_are_delivered_as_stored(write_gguf, tmp_path, kind):
    numpy_dtype, dtype = PLAIN[kind]
    values = np.arange(24).astype(numpy_dtype).reshape(2, 3, 4)
    writer = gguf.GGUFWriter(tmp_path / "plain.gguf", "llama")
    writer.add_tensor("w", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    reader = GGUFTensorReader(read_header(tmp_path / "plain.gguf"))
    (tensor,) = reader.tensors()
    assert tensor.spec.dtype == dtype
    assert reader.working_bytes(tensor) == tensor.spec.nbytes == values.nbytes
    assert torch.equal(tensor.read(), torch.from_numpy(values))


def test_bf16_stays_bf16(write_gguf, tmp_path):
    values = np.random.default_rng(2).standard_normal((4, 8), dtype=np.float32)
    reader = write_one(write_gguf, tmp_path, Kind.BF16, values)
    (tensor,) = reader.tensors()
    assert torch.equal(tensor.read(), torch.from_numpy(values).to(torch.bfloat16))


def test_a_scalar_and_an_empty_tensor(write_gguf, tmp_path):
    tensors = {
        "empty": (np.zeros((0, 32), np.float32), Kind.F32),
        "none packed": (np.zeros((0, 34), np.uint8), Kind.Q8_0),
        "one": (np.full((1,), 7, np.float32), Kind.F32),
    }
    reader = GGUFTensorReader(read_header(write_gguf(tmp_path / "small.gguf", "llama", {}, tensors)))
    values = {tensor.name: tensor.read() for tensor in reader.tensors()}
    assert {name: tuple(value.shape) for name, value in values.items()} == {
        "empty": (0, 32),
        "none packed": (0, 32),
        "one": (1,),
    }
    assert values["one"].item() == 7


@pytest.mark.parametrize("kind", PACKED, ids=lambda kind: kind.name)
def test_working_bytes_are_an_upper_bound(write_gguf, tmp_path, kind):
    """If this fails, a new gguf release needs more room to unpack: measure, and raise the bound in reader.py."""
    reader = write_one(write_gguf, tmp_path, kind, random_blocks(kind, (200, 1024)))
    (tensor,) = reader.tensors()
    tracemalloc.start()
    try:
        result = tensor.read()
        peak = tracemalloc.get_traced_memory()[1]  # numpy's buffers; the result is torch's and isn't traced
    finally:
        tracemalloc.stop()
    assert peak + result.nbytes <= reader.working_bytes(tensor)
    assert reader.working_bytes(tensor) <= result.nbytes + 5 * 2**20


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q5_1, Kind.IQ4_XS])
def test_packed_weights_are_rounded_to_the_models_dtype_chunk_by_chunk(write_gguf, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(reader_module, "CHUNK", 1024)
    raw = random_blocks(kind, (7, 768))
    reader = write_one(write_gguf, tmp_path, kind, raw, dtype=torch.bfloat16)
    (tensor,) = reader.tensors()
    assert tensor.spec.dtype == torch.bfloat16
    assert reader.working_bytes(tensor) < 2 * raw.size * 32 + 2**21
    wanted = torch.from_numpy(expected(raw, kind)).to(torch.bfloat16)
    assert torch.equal(tensor.read().nan_to_num(), wanted.nan_to_num())


def test_what_may_have_to_be_computed_with_stays_float32(write_gguf, tmp_path):
    """Norms with an offset, state space matrices stored as logarithms, biases."""
    blocks = {
        "output_norm.weight": random_blocks(Kind.Q8_0, (64,)),
        "blk.0.ssm_a": random_blocks(Kind.Q8_0, (2, 64)),
        "blk.0.attn_q.bias": random_blocks(Kind.Q8_0, (64,)),
    }
    tensors = {name: (raw, Kind.Q8_0) for name, raw in blocks.items()}
    tensors["blk.0.ffn_norm.weight"] = (np.ones(64, np.float32), Kind.F32)
    file = write_gguf(tmp_path / "exact.gguf", "llama", {}, tensors)
    for tensor in GGUFTensorReader(read_header(file), dtype=torch.bfloat16).tensors():
        assert tensor.spec.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0, Kind.Q4_K, Kind.Q6_K, Kind.IQ4_XS])
def test_blocks_computed_in_another_dtype_are_those_of_transformers(write_gguf, tmp_path, monkeypatch, kind, dtype):
    from transformers.integrations.gguf.dequant import dequantize

    monkeypatch.setattr(reader_module, "CHUNK", 1024)
    raw = random_blocks(kind, (7, 768))
    reader = write_one(write_gguf, tmp_path, kind, raw, dtype=dtype, compute_in_dtype=True)
    (tensor,) = reader.tensors()
    assert tensor.spec.dtype == dtype
    wanted = dequantize(torch.from_numpy(raw).reshape(-1), int(kind), dtype).reshape(7, 768)
    assert torch.equal(tensor.read().nan_to_num(), wanted.nan_to_num())


def test_types_without_torch_code_are_computed_in_float32_and_rounded_once(write_gguf, tmp_path):
    raw = random_blocks(Kind.Q5_0, (2, 64))
    reader = write_one(write_gguf, tmp_path, Kind.Q5_0, raw, dtype=torch.bfloat16, compute_in_dtype=True)
    (tensor,) = reader.tensors()
    wanted = torch.from_numpy(expected(raw, Kind.Q5_0)).to(torch.bfloat16)
    assert torch.equal(tensor.read().nan_to_num(), wanted.nan_to_num())


def test_a_type_that_cannot_be_unpacked_is_named(write_gguf, tmp_path):
    reader = write_one(write_gguf, tmp_path, Kind.Q8_K, random_blocks(Kind.Q8_K, (2, 256)))
    with pytest.raises(UnsupportedError, match=r"one\.gguf: tensor 'w.weight' is Q8_K.*requantize"):
        list(reader.tensors())


def test_a_file_that_shrinks_is_an_error_naming_the_tensor(write_gguf, tmp_path):
    reader = write_one(write_gguf, tmp_path, Kind.F32, np.ones((64, 64), np.float32))
    (tensor,) = reader.tensors()
    os.truncate(tensor.file, tensor.offset + 100)
    with pytest.raises(CheckpointError, match=r"one\.gguf: tensor 'w.weight': ends before its values do") as caught:
        tensor.read()
    assert (caught.value.file, caught.value.tensor) == (tensor.file, "w.weight")


def test_closing_twice_is_fine_and_reading_then_is_an_error(tiny_llama):
    reader = GGUFTensorReader(read_header(tiny_llama))
    tensor = next(reader.tensors())
    before = tensor.read()
    reader.will_need(tensor)
    reader.close()
    reader.close()
    reader.will_need(tensor)
    with pytest.raises(CheckpointError, match="was closed"):
        tensor.read()
    assert before.isfinite().all()


def test_tensors_come_in_file_order_with_their_place(tiny_llama):
    reader = GGUFTensorReader(read_header(tiny_llama))
    offsets = {tensor.name: (tensor.offset, tensor.stored_nbytes) for tensor in reader.tensors()}
    library = {tensor.name: (tensor.data_offset, tensor.n_bytes) for tensor in gguf.GGUFReader(tiny_llama).tensors}
    assert offsets == library
    assert list(offsets.values()) == sorted(offsets.values())


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"no\.gguf: can't be opened"):
        read_header(tmp_path / "no.gguf")


def test_a_file_that_was_changed_since_its_header_was_read_is_refused(tiny_llama):
    header = read_header(tiny_llama)
    os.utime(tiny_llama, ns=(0, 0))
    with pytest.raises(CheckpointError, match=r"tiny\.gguf: was changed while it was being opened"):
        GGUFTensorReader(header)
