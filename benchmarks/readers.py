"""The contenders that only read: all tensors of all shards, by name, assigned to nothing.

What they take is a part of what a loader takes. All but safetensors and transformers are optional packages.
"""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.contenders import Load
from benchmarks.jobs import Job

_State = dict[str, torch.Tensor]

QUANTIZED = "_proj.weight"
"""How the names of the weights end that are quantized, in the checkpoints that are made here."""


def _shards(folder: str) -> list[str]:
    return sorted(str(file) for file in Path(folder).glob("*.safetensors"))


def safetensors(job: Job) -> Load:
    """``safetensors.torch.load_file``, which maps the files."""
    from safetensors.torch import load_file

    def load(folder: str) -> _State:
        return {name: tensor for shard in _shards(folder) for name, tensor in load_file(shard).items()}

    return load


def fastsafetensors(job: Job) -> Load:
    """fastsafetensors; its tensors keep their buffers alive after the block."""
    from fastsafetensors import fastsafe_open

    def load(folder: str) -> _State:
        with fastsafe_open(_shards(folder), device="cpu", nogds=True) as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping

    return load


def instanttensor(job: Job) -> Load:
    """InstantTensor."""
    from instanttensor import safe_open

    def load(folder: str) -> _State:
        with safe_open(_shards(folder), framework="pt", device="cpu") as opened:
            return dict(opened.tensors())

    return load


def runai(job: Job) -> Load:
    """Run:ai Model Streamer; it gives its tensors away."""
    from runai_model_streamer import SafetensorsStreamer

    def load(folder: str) -> _State:
        with SafetensorsStreamer() as streamer:
            streamer.stream_files(_shards(folder))
            return dict(streamer.get_tensors())

    return load


def fp8_function(job: Job) -> Load:
    """transformers' function for FP8, weight by weight in the calling thread, as its loader would call it."""
    from types import SimpleNamespace

    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    block = (128, 128) if job.case == "fp8-block" else None
    config = SimpleNamespace(weight_block_size=block, scale_fmt="float")
    function = Fp8Quantize(SimpleNamespace(quantization_config=config))
    read = safetensors(job)

    def load(folder: str) -> _State:
        state: _State = read(folder)
        for name in [name for name in state if name.endswith(QUANTIZED)]:
            for part, made in function.convert({name: state[name]}).items():
                state[part] = made.squeeze() if block is None else made  # one scale has no dimensions in FP8Linear
        return state

    return load
