"""How the scales of a weight are stored: one for all of it, one per row, or one per block; experts have one more
dimension, and everything once per expert."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from quantdock import Parameter, TensorSpec, UnsupportedError

WEIGHT_DTYPE = torch.float8_e4m3fn
SCALE_NAMES = ("weight_scale_inv", "weight_scale", "scale")
"""What checkpoints call the scale, which is multiplied with under any name: DeepSeek-V3 and transformers say the first
one, DeepSeek-V4 the last, everybody else the second."""

ACTIVATION_NAMES = ("activation_scale", "input_scale")
"""What they call the scale of activations, in the same order."""

EXTRA_NAMES = (*ACTIVATION_NAMES, "input_scale_ub", "k_scale", "v_scale")
"""Further tensors beside a weight, kept for those who quantize what they describe: activations and the cache."""

Rule = Literal["reciprocal", "power_of_two", "floored"]
Granularity = Literal["tensor", "row", "block"]
Block = tuple[int, int]
Shape = tuple[int, ...]

STACKED_LEAVES = ("gate_up_proj", "up_proj", "down_proj")
"""What transformers calls the weights of all experts of a layer where a checkpoint has them in one tensor."""

_EXPONENTS = (torch.float8_e8m0fnu, torch.uint8)
_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, *_EXPONENTS)


@dataclass(frozen=True, slots=True)
class Tiling:
    """Which elements of a matrix share a scale."""

    block: Block
    """Rows and columns; blocks at the edges may be smaller."""
    parts: int = 1
    """Ranges of rows of the same size, each of which begins with a block of its own."""

    def grid(self, shape: Shape) -> Block:
        """How many blocks a matrix has down and across."""
        down, across = grid((shape[0] // self.parts, shape[1]), self.block)
        return self.parts * down, across

    def ranges(self, rows: int) -> Iterator[tuple[slice, slice]]:
        """The parts of a matrix: their rows, and the rows of scales that belong to them."""
        each = rows // self.parts
        down = -(-each // self.block[0])
        for part in range(self.parts):
            yield slice(part * each, (part + 1) * each), slice(part * down, (part + 1) * down)


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

    def tilings(self, shape: Shape, parts: int = 0) -> dict[Shape, Tiling]:
        """Shapes that a scale may have -> which elements of a matrix share one.

        Args:
            shape: of the weight, ``[rows, columns]`` or ``[experts, rows, columns]``.
            parts: ranges of rows of each expert's matrix that are stored as tensors of their own, of the same size; 0
                where nothing is cut up.
        """
        *experts, rows, columns = shape
        each = rows // max(1, parts)
        found: dict[Shape, Tiling] = {}
        for granularity in self.granularities:
            if granularity == "tensor":
                whole = Tiling((each, columns))
                found |= dict.fromkeys([(*experts, parts), (*experts, parts, 1)] if parts else [], whole)
                if not parts or parts == 1:
                    found |= dict.fromkeys([(*experts, 1, 1)] if experts else [(), (1,)], whole)
            elif granularity == "row":
                found |= dict.fromkeys([(*experts, rows, 1), (*experts, rows)], Tiling((1, columns)))
            else:
                assert self.block_size is not None
                tiling = Tiling(self.block_size, parts if parts and each % self.block_size[0] else 1)
                down, across = tiling.grid((rows, columns))
                # ModelOpt writes four dimensions.
                found |= dict.fromkeys([(*experts, down, across), (*experts, down, 1, across, 1)], tiling)
        return found

    def made(self, parameter: Parameter, parts: int = 0) -> dict[str, TensorSpec]:
        """The components that quantizing makes; ``parts`` as for ``tilings``."""
        dtype = torch.float8_e8m0fnu if self.rule == "power_of_two" else torch.float32
        shape = next(iter(self.tilings(parameter.spec.shape, parts)))
        return {
            parameter.leaf: TensorSpec(dtype=WEIGHT_DTYPE, shape=parameter.spec.shape),
            component_of(self.scale_name, parameter.leaf): TensorSpec(dtype=dtype, shape=shape),
        }

    def stored(self, parameter: Parameter, found: Mapping[str, TensorSpec], parts: int = 0) -> dict[str, TensorSpec]:
        """The components of a checkpoint, in order, if they are what this scheme can read; ``parts`` as for
        ``tilings``.

        Raises:
            UnsupportedError: names the parameter and every component that is missing, surplus or different.
        """
        leaf = parameter.leaf
        scales, activations, extra = (
            [component_of(name, leaf) for name in names] for names in (SCALE_NAMES, ACTIVATION_NAMES, EXTRA_NAMES)
        )
        ones = [(), (1,)] if len(parameter.spec.shape) == 2 else _one_each(parameter.spec.shape[0], parts)
        expected = TensorSpec(dtype=WEIGHT_DTYPE, shape=parameter.spec.shape)
        weight = found.get(parameter.leaf)
        problems = []
        if weight is None:
            problems.append(f"component {parameter.leaf!r} is missing, expected {expected}")
        elif weight != expected:
            problems.append(f"component {parameter.leaf!r} is {weight}, expected {expected}")
        problems += self._scale_problems(parameter, found, [name for name in scales if name in found], parts)
        if self.static and not any(name in found for name in activations):
            problems.append(f"component {activations[1]!r} is missing, which activation_scheme='static' needs")
        for name in found.keys() - {leaf, *scales}:
            if name not in extra:
                problems.append(f"component {name!r} is not part of the format")
            elif found[name].shape not in ones:
                problems.append(f"component {name!r} is {found[name]}, expected one element")
        if problems:
            raise UnsupportedError(f"{parameter.name}: " + "; ".join(sorted(problems)))
        return {name: found[name] for name in (leaf, *scales, *extra) if name in found}

    def _scale_problems(
        self, parameter: Parameter, found: Mapping[str, TensorSpec], names: list[str], parts: int
    ) -> list[str]:
        if not names:
            name = component_of(self.scale_name, parameter.leaf)
            return [f"component {name!r} is missing: the codes mean nothing without their scale"]
        if len(names) > 1:
            return [f"it has both {names[0]!r} and {names[1]!r}, expected one scale"]
        scale, shapes = found[names[0]], list(self.tilings(parameter.spec.shape, parts))
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


def component_of(name: str, leaf: str) -> str:
    """What a parameter called ``leaf`` calls the component that beside a ``weight`` is ``name``; for experts as
    transformers has it: ``gate_up_proj_scale_inv``."""
    if leaf == "weight":
        return name
    if name == "scale":  # what comes of "weight_scale" has the shorter name
        return f"{leaf}_plain_scale"
    return leaf + name.removeprefix("weight") if name.startswith("weight") else f"{leaf}_{name}"


def scale_of(components: Mapping[str, object], leaf: str = "weight") -> str:
    """Which component is the scale."""
    return next(found for name in SCALE_NAMES if (found := component_of(name, leaf)) in components)


def _one_each(experts: int, parts: int) -> list[Shape]:
    return [(experts, max(1, parts)), (experts, max(1, parts), 1)]


def as_grid(scale: Tensor, down: int, across: int) -> Tensor:
    """A stored scale as ``float32 [blocks down, blocks across]``.

    One byte is an exponent (``2 ** (byte - 127)``, 255 is NaN), whether its dtype says so or not: OCP Microscaling
    Formats 1.0, section 5.4.1.
    """
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    return scale.to(torch.float32).reshape(down, across)
