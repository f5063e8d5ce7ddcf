"""Small GGUF files, written by the gguf package's own writer."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

Tensors = Mapping[str, tuple[np.ndarray, Kind]]
Write = Callable[..., Path]


@pytest.fixture
def write_gguf() -> Write:
    """``write_gguf(path, architecture, metadata, {name: (float32 array or raw blocks, kind)})``."""
    return _write


@pytest.fixture
def tiny_llama(tmp_path: Path) -> Path:
    """A llama of two layers in a file of its own, half of it in Q8_0."""
    return _write(tmp_path / "tiny.gguf", "llama", LLAMA_METADATA, llama_tensors())


@pytest.fixture
def smollm2_gguf() -> Path:
    """The demo's model, where it was fetched."""
    beside = Path(__file__).resolve().parents[3] / ".cache" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    path = Path(os.environ.get("QUANTDOCK_SMOLLM2", beside))
    if not path.is_file():
        pytest.skip("the demo's model isn't here; fetch it with `make demo`, or name it in QUANTDOCK_SMOLLM2")
    return path


LLAMA_METADATA = {
    "llama.context_length": 64,
    "llama.block_count": 2,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 10000.0,
    "llama.rope.dimension_count": 16,
    "tokenizer.ggml.tokens": [f"token{number}" for number in range(96)],
    "tokenizer.ggml.eos_token_id": 2,
}


def llama_tensors(seed: int = 0) -> dict[str, tuple[np.ndarray, Kind]]:
    random = np.random.default_rng(seed)
    shapes = {"token_embd.weight": (96, 64), "output_norm.weight": (64,)}
    for block in range(2):
        shapes |= {
            f"blk.{block}.attn_norm.weight": (64,),
            f"blk.{block}.attn_q.weight": (64, 64),
            f"blk.{block}.attn_k.weight": (32, 64),
            f"blk.{block}.attn_v.weight": (32, 64),
            f"blk.{block}.attn_output.weight": (64, 64),
            f"blk.{block}.ffn_norm.weight": (64,),
            f"blk.{block}.ffn_gate.weight": (96, 64),
            f"blk.{block}.ffn_up.weight": (96, 64),
            f"blk.{block}.ffn_down.weight": (64, 96),
        }
    return {
        name: (random.standard_normal(shape, dtype=np.float32), Kind.F32 if len(shape) < 2 else Kind.Q8_0)
        for name, shape in shapes.items()
    }


def _write(path: Path, architecture: str, metadata: Mapping[str, Any], tensors: Tensors) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        _add(writer, key, value)
    for name, (array, kind) in tensors.items():
        raw = array if array.dtype == np.uint8 else gguf.quantize(array, kind)
        writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, Sequence):
        writer.add_array(key, value)
    else:
        raise TypeError(f"{key}: {value!r}")
