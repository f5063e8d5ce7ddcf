"""Weights in the layout of the Marlin kernel, which some checkpoints are stored in: read, computed with, saved again.

Facts from ``Layer.pack`` and ``_get_perms`` of IST-DASLab's marlin: 4 bits, symmetric (codes less 8 times a scale), a
scale for 128 inputs or for all. Codes lie in tiles of 16 inputs and 16 outputs, four tiles side by side make a run of
1024 codes, and each run is in the order in which a warp's threads need it. So are scales, in runs of 64 or 32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from quantdock import TensorSpec, UnsupportedError, linears, ops
from quantdock_gptq.config import GPTQConfig

FORMAT = "marlin"
NAMES = ("B", "s")

_BITS, _MIDDLE = 4, 8
_TILE, _WIDE = 16, 64  # inputs of a run, and outputs
_RUN = _TILE * _WIDE
_WORDS = _RUN * _BITS // 32
_GROUPS = (128, -1)
_INPUTS, _OUTPUTS = 128, 256  # what the kernel takes multiples of


def expect(config: GPTQConfig, *, prequantized: bool) -> None:
    """
    Raises:
        UnsupportedError: a config that there is no such layout for.
    """
    if not prequantized:
        raise UnsupportedError(
            "the checkpoint format 'marlin' is read, not made: a runtime makes it from 'gptq' while it loads; set "
            "checkpoint_format to 'gptq'"
        )
    expected: dict[str, tuple[object, ...]] = {
        "bits": (_BITS,),
        "group_size": _GROUPS,
        "sym": (True,),
        "desc_act": (False,),
        "dynamic": (None, {}),
    }
    for name, values in expected.items():
        if getattr(config, name) not in values:
            raise UnsupportedError(
                f"{name} is {getattr(config, name)!r}, but the checkpoint format 'marlin' has {name}="
                f"{' or '.join(map(str, values))} only; the quantization_config is wrong"
            )


def checked(
    name: str, shape: tuple[int, int], group_size: int, found: Mapping[str, TensorSpec]
) -> dict[str, TensorSpec]:
    """The stored tensors of a weight.

    Args:
        name: of the weight, for messages.
        shape: ``[outputs, inputs]``.
        group_size: 128 or -1.
        found: component -> dtype and shape.

    Raises:
        UnsupportedError: there is no such layout for it, or names every component that doesn't fit.
    """
    outputs, inputs = shape
    if inputs % _INPUTS or outputs % _OUTPUTS:
        raise UnsupportedError(
            f"{name}: {outputs} outputs and {inputs} inputs, expected multiples of {_OUTPUTS} and {_INPUTS} in the "
            "checkpoint format 'marlin'; the quantization_config is wrong"
        )
    groups = 1 if group_size == -1 else inputs // group_size
    expected = {
        "B": TensorSpec(dtype=torch.int32, shape=(inputs // _TILE, outputs * _TILE * _BITS // 32)),
        "s": TensorSpec(dtype=torch.float16, shape=(groups, outputs)),
    }
    problems = [f"component {part!r} is missing, expected {expected[part]}" for part in expected.keys() - found.keys()]
    problems += [f"component {part!r} is not part of the format" for part in found.keys() - expected.keys()]
    problems += [
        f"component {part!r} is {found[part]}, expected {spec}"
        for part, spec in expected.items()
        if part in found and found[part] != spec
    ]
    if problems:
        raise UnsupportedError(
            f"{name}: {'; '.join(sorted(problems))}, for the checkpoint format 'marlin' and group_size={group_size}. "
            "The files and the quantization_config contradict each other, or the download is incomplete"
        )
    return expected


@dataclass(frozen=True, kw_only=True, eq=False)
class MarlinWeight:
    """The stored tensors of one weight, read as ``quantdock.linears`` wants it."""

    inputs: int
    outputs: int
    packed: Tensor | None
    """int32 ``[inputs / 16, outputs * 2]``; ``None`` when codes aren't asked for."""
    group_scales: Tensor
    """float16 ``[groups, outputs]``, in runs."""

    @property
    def bits(self) -> int:
        return _BITS

    def codes(self, part: slice) -> Tensor:
        assert self.packed is not None
        first, last = part.start // _WIDE, -(-part.stop // _WIDE)
        words = self.packed[:, first * _WORDS : last * _WORDS].contiguous()
        runs = words.new_empty(len(words), (last - first) * _RUN, dtype=torch.uint8)
        ops.unpack_words(words, bits=_BITS, dim=1, codes=runs)
        tiles = runs.view(-1, _RUN)[:, _places(words.device)].view(
            len(words), last - first, _WIDE // _TILE, _TILE, _TILE
        )
        codes = tiles.permute(0, 3, 1, 2, 4).reshape(self.inputs, -1)
        return codes[:, part.start - first * _WIDE : part.stop - first * _WIDE]

    def scales(self, part: slice) -> Tensor:
        first, last = part.start // _WIDE, -(-part.stop // _WIDE)
        order = _scale_order(len(self.group_scales) > 1, self.group_scales.device).argsort()
        runs = self.group_scales[:, first * _WIDE : last * _WIDE].reshape(-1, len(order))[:, order]
        found = runs.view(len(self.group_scales), -1)
        return found[:, part.start - first * _WIDE : part.stop - first * _WIDE]

    def zeros(self, part: slice) -> Tensor:
        shape = (len(self.group_scales), part.stop - part.start)
        return torch.full(shape, _MIDDLE, dtype=torch.uint8, device=self.group_scales.device)

    def grouping(self) -> linears.Grouping:
        return self.inputs // len(self.group_scales)


class MarlinLinear(linears.GroupedLinear):
    """A linear layer with the buffers ``B`` and ``s``; made on the meta device.

    Args:
        shape: ``[out, in]``.
        components: dtypes and shapes of the buffers.
        bias: ``[out]``, or ``None``.
        compute_dtype: what activations are cast to; ``None`` leaves them as they come.
    """

    code_buffers: ClassVar[tuple[str, ...]] = ("B",)

    def __init__(
        self,
        shape: tuple[int, int],
        components: Mapping[str, TensorSpec],
        *,
        bias: nn.Parameter | None,
        compute_dtype: torch.dtype | None,
    ) -> None:
        super().__init__(shape[1], shape[0], bias=bias, compute_dtype=compute_dtype)
        for name, spec in components.items():
            self.register_buffer(name, torch.empty(spec.shape, dtype=spec.dtype, device="meta"))

    def stored_weight(self) -> MarlinWeight:
        return weight_of(self._buffers, (self.out_features, self.in_features))

    def encode(self, codes: Callable[[slice], Tensor]) -> Mapping[str, Tensor]:
        rows = self.in_features // _TILE
        packed = torch.empty(rows, self.out_features * 2, dtype=torch.int32, device="cpu")
        for part in linears.pieces(self.out_features, self.in_features):
            blocks = (part.stop - part.start) // _WIDE
            tiles = codes(part).reshape(rows, _TILE, blocks, _WIDE // _TILE, _TILE).permute(0, 2, 3, 1, 4)
            runs = tiles.reshape(-1, _RUN)[:, _order(tiles.device)].view(rows, blocks * _RUN)
            words = packed.new_empty(rows, blocks * _WORDS)
            ops.pack_words(runs, bits=_BITS, dim=1, words=words)
            packed[:, part.start * 2 : part.stop * 2] = words
        return {"B": packed}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={_BITS}, format={FORMAT}"


def weight_of(tensors: Mapping[str, Tensor | None], shape: tuple[int, int]) -> MarlinWeight:
    """The weight ``[out, in]`` that stored tensors are, by their names."""
    scales = tensors["s"]
    assert scales is not None
    return MarlinWeight(inputs=shape[1], outputs=shape[0], packed=tensors["B"], group_scales=scales)


@functools.lru_cache(maxsize=8)
def _order(device: torch.device) -> Tensor:
    """Which code of a run of four tiles is stored where: int64 ``[1024]``, an index into ``[tile, input, output]``.

    A thread holds the codes of one output in two pairs of inputs, of both halves of a tile; four tiles follow one
    another, and of each eight codes the even ones come first.
    """
    thread = torch.arange(32)
    pairs = torch.tensor([0, 1, 8, 9])
    rows = 2 * (thread % 4)[:, None] + pairs
    half = rows[:, None] * _TILE + (thread // 4)[:, None, None] + 8 * torch.arange(2)[:, None]
    tiles = half.view(32, 1, 8) + _TILE * _TILE * torch.arange(4)[:, None]
    return tiles[..., [0, 2, 4, 6, 1, 3, 5, 7]].reshape(-1).to(device)


@functools.lru_cache(maxsize=8)
def _places(device: torch.device) -> Tensor:
    """What ``_order`` undoes."""
    return _order(device).argsort()


@functools.lru_cache(maxsize=8)
def _scale_order(grouped: bool, device: torch.device) -> Tensor:
    """The same for scales: int64 ``[64]`` for several groups, ``[32]`` for one."""
    if grouped:
        return torch.arange(64).view(8, 8).t().reshape(-1).to(device)
    return (2 * torch.arange(4)[:, None] + torch.tensor([0, 1, 8, 9, 16, 17, 24, 25])).reshape(-1).to(device)
