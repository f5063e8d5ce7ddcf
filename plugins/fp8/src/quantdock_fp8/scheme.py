"""How the scales of a weight are stored: one for all of it, one per row, or one per block."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from quantdock import Parameter, TensorSpec, UnsupportedError

WEIGHT_DTYPE = torch.float8_e4m3fn
SCALE_NAMES = ("weight_scale_inv", "weight_scale")
"""What checkpoints call the scale, which is multiplied with under either name: DeepSeek and transformers say the first
one, everybody else the second."""

ACTIVATION_NAMES = ("activation_scale", "input_scale")
"""What they call the scale of activations, in the same order."""

EXTRA_NAMES = (*ACTIVATION_NAMES, "input_scale_ub", "k_scale", "v_scale")
"""Further tensors beside a weight, kept for those who quantize what they describe: activations and the cache."""

Rule = Literal["reciprocal", "power_of_two", "floored"]
Granularity = Literal["tensor", "row", "block"]
Block = tuple[int, int]
Shape = tuple[int, ...]

_EXPONENTS = (torch.float8_e8m0fnu, torch.uint8)
_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, *_EXPONENTS)


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """What a config says about scales."""

    granularities: tuple[Granularity, ...]
    """What a checkpoint may hold; the first one is what quantizing makes."""
    block_size: Block | None = None
    """Rows and columns of a block."""
    scale_name: str = "weight_scale_inv"
    """The component that quantizing makes."""
    rule: Rule = "reciprocal"
    """How quantizing makes scales; see ``quantdock.ops.fp8_scales``. Powers of two are stored as float8_e8m0fnu."""
    static: bool = False
    """Whether a weight has to come with a scale for its activations."""

    def stored_blocks(self, shape: Shape) -> dict[Shape, Block]:
        """Shapes that the scale of a weight ``[rows, columns]`` may have -> rows and columns that share a scale."""
        rows, columns = shape
        found: dict[Shape, Block] = {}
        for granularity in self.granularities:
            if granularity == "tensor":
                found |= dict.fromkeys([(), (1,)], (rows, columns))
            elif granularity == "row":
                found |= dict.fromkeys([(rows, 1), (rows,)], (1, columns))
            else:
                assert self.block_size is not None
                down, across = grid(shape, self.block_size)
                # ModelOpt writes four dimensions.
                found |= dict.fromkeys([(down, across), (down, 1, across, 1)], self.block_size)
        return found

    def made(self, parameter: Parameter) -> dict[str, TensorSpec]:
        """The components that quantizing makes."""
        dtype = torch.float8_e8m0fnu if self.rule == "power_of_two" else torch.float32
        shape = next(iter(self.stored_blocks(parameter.spec.shape)))
        return {
            parameter.leaf: TensorSpec(dtype=WEIGHT_DTYPE, shape=parameter.spec.shape),
            self.scale_name: TensorSpec(dtype=dtype, shape=shape),
        }

    def stored(self, parameter: Parameter, found: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        """The components of a checkpoint, in order, if they are what this scheme can read.

        Raises:
            UnsupportedError: names the parameter and every component that is missing, surplus or different.
        """
        expected = TensorSpec(dtype=WEIGHT_DTYPE, shape=parameter.spec.shape)
        weight = found.get(parameter.leaf)
        problems = []
        if weight is None:
            problems.append(f"component {parameter.leaf!r} is missing, expected {expected}")
        elif weight != expected:
            problems.append(f"component {parameter.leaf!r} is {weight}, expected {expected}")
        problems += self._scale_problems(parameter, found)
        if self.static and not any(name in found for name in ACTIVATION_NAMES):
            problems.append(f"component {ACTIVATION_NAMES[1]!r} is missing, which activation_scheme='static' needs")
        for name in found.keys() - {parameter.leaf, *SCALE_NAMES}:
            if name not in EXTRA_NAMES:
                problems.append(f"component {name!r} is not part of the format")
            elif math.prod(found[name].shape) != 1 or len(found[name].shape) > 1:
                problems.append(f"component {name!r} is {found[name]}, expected one element")
        if problems:
            raise UnsupportedError(f"{parameter.name}: " + "; ".join(sorted(problems)))
        return {name: found[name] for name in (parameter.leaf, *SCALE_NAMES, *EXTRA_NAMES) if name in found}

    def _scale_problems(self, parameter: Parameter, found: Mapping[str, TensorSpec]) -> list[str]:
        names = [name for name in SCALE_NAMES if name in found]
        if not names:
            return [f"component {self.scale_name!r} is missing: the codes mean nothing without their scale"]
        if len(names) > 1:
            return [f"it has both {names[0]!r} and {names[1]!r}, expected one scale"]
        scale, shapes = found[names[0]], list(self.stored_blocks(parameter.spec.shape))
        expected = " or ".join(str(list(shape)) for shape in shapes)
        if scale.shape not in shapes:
            why = "" if self.block_size is None else f" for blocks of {list(self.block_size)}"
            return [f"component {names[0]!r} is {scale}, expected the shape {expected}{why}"]
        if scale.dtype not in _SCALE_DTYPES:
            dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in _SCALE_DTYPES)
            return [f"component {names[0]!r} is {scale}, expected one of {dtypes}"]
        return []


def grid(shape: Shape, block: Block) -> Block:
    """How many blocks a matrix has down and across; those at the edges may be smaller."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def scale_of(components: Mapping[str, object]) -> str:
    """Which component is the scale."""
    return next(name for name in SCALE_NAMES if name in components)


def as_grid(scale: Tensor, shape: Shape, block: Block) -> Tensor:
    """A stored scale as ``float32 [blocks down, blocks across]``.

    One byte is an exponent (``2 ** (byte - 127)``, 255 is NaN), whether its dtype says so or not: OCP Microscaling
    Formats 1.0, section 5.4.1.
    """
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    return scale.to(torch.float32).reshape(grid(shape, block))
