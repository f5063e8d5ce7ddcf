"""How a weight is stored: its codes, and scales for all of it, for its rows, or for its blocks; experts have one more
dimension, and everything once per expert."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from quantdock import Parameter, TensorSpec, UnsupportedError
from quantdock_fp8.tiling import Block, Shape, Tiling
from quantdock_fp8.weight import Coding

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

STACKED_LEAVES = ("gate_up_proj", "up_proj", "down_proj")
"""What transformers calls the weights of all experts of a layer where a checkpoint has them in one tensor."""

EXPONENTS = (torch.float8_e8m0fnu, torch.uint8)
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, *EXPONENTS)


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """What a config says about the tensors of a weight. Names are those beside a ``weight``; see ``component_of``."""

    granularities: tuple[Granularity, ...]
    """What a checkpoint may hold; the first one is what quantizing makes."""
    block_size: Block | None = None
    """Rows and columns of a block."""
    scale_name: str = "weight_scale_inv"
    """The component that quantizing makes."""
    scale_names: tuple[str, ...] = SCALE_NAMES
    """What a checkpoint may call it."""
    scale_dtypes: tuple[torch.dtype, ...] = SCALE_DTYPES
    rule: Rule = "reciprocal"
    """How quantizing makes scales; see ``quantdock.ops.fp8_scales``. Powers of two are stored as float8_e8m0fnu."""
    static: str | None = None
    """What in the config says that a weight comes with a scale for its activations; ``None`` if nothing does."""
    extra_names: tuple[str, ...] = EXTRA_NAMES
    """Components of one element that may be there, and are kept."""

    codes_name: str = "weight"
    bits: Literal[4, 8] = 8
    in_blocks: bool = False
    """Whether codes have one more dimension, along which those are that share a scale."""
    swapped: bool = False
    """Whether parameters are the transposes of what is stored."""
    factor_name: str | None = None
    """The component with one number that the scales of a weight are scaled with."""
    divides: bool = False
    """Whether scales are divided by that number, instead of multiplied with it."""

    # What is stored -----------------------------------------------------------------------------------------------

    def names(self) -> tuple[str, ...]:
        """Every component there may be."""
        return (self.codes_name, *self.scale_names, *self.factor_names, *self.extra_names)

    @property
    def factor_names(self) -> tuple[str, ...]:
        """``factor_name``, if there is one."""
        return () if self.factor_name is None else (self.factor_name,)

    def decoded(self, codes: TensorSpec) -> TensorSpec | None:
        """What ``codes`` stand for, if their shape is another one; ``None`` if it isn't, or they aren't such codes."""
        if self.bits == 8 or self.in_blocks or codes.dtype != torch.uint8 or not codes.shape:
            return None
        *outer, last = codes.shape
        return TensorSpec(dtype=torch.bfloat16, shape=(*outer, 2 * last))

    def shape(self, parameter: Parameter) -> Shape:
        """``[rows, columns]`` or ``[experts, rows, columns]`` of what is encoded."""
        *outer, rows, columns = parameter.spec.shape
        return (*outer, columns, rows) if self.swapped else (*outer, rows, columns)

    def codes(self, parameter: Parameter) -> TensorSpec:
        """What codes are stored as.

        Raises:
            UnsupportedError: columns are no multiple of a block.
        """
        *outer, rows, columns = self.shape(parameter)
        if self.bits == 8:
            return TensorSpec(dtype=WEIGHT_DTYPE, shape=(*outer, rows, columns))
        assert self.block_size is not None
        across, left = divmod(columns, self.block_size[1])
        if left:
            raise UnsupportedError(
                f"{parameter.name}: it has rows of {columns} elements, which groups of {self.block_size[1]} elements "
                "don't divide; leave it unquantized"
            )
        last = (across, self.block_size[1] // 2) if self.in_blocks else (columns // 2,)
        return TensorSpec(dtype=torch.uint8, shape=(*outer, rows, *last))

    def tilings(self, shape: Shape, parts: int = 0) -> dict[Shape, Tiling]:
        """Shapes that a scale may have -> which elements of a matrix share one.

        Args:
            shape: of what is encoded, ``[rows, columns]`` or ``[experts, rows, columns]``.
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

    def coding(self, parameter: Parameter, components: Mapping[str, TensorSpec], parts: int = 0) -> Coding:
        """Which component is what; the shape of the scale tells which elements share one. ``parts`` as for
        ``tilings``."""
        leaf = parameter.leaf
        scale = next(name for name in self._called(self.scale_names, leaf) if name in components)
        return Coding(
            codes=component_of(self.codes_name, leaf),
            scale=scale,
            tiling=self.tilings(self.shape(parameter), parts)[components[scale].shape],
            factor=None if self.factor_name is None else component_of(self.factor_name, leaf),
            divides=self.divides,
            in_blocks=self.in_blocks,
            swapped=self.swapped,
        )

    def made(self, parameter: Parameter, parts: int = 0) -> dict[str, TensorSpec]:
        """The components that quantizing makes; ``parts`` as for ``tilings``."""
        dtype = torch.float8_e8m0fnu if self.rule == "power_of_two" else torch.float32
        shape = next(iter(self.tilings(parameter.spec.shape, parts)))
        return {
            parameter.leaf: TensorSpec(dtype=WEIGHT_DTYPE, shape=parameter.spec.shape),
            component_of(self.scale_name, parameter.leaf): TensorSpec(dtype=dtype, shape=shape),
        }

    # What a checkpoint has ----------------------------------------------------------------------------------------

    def stored(self, parameter: Parameter, found: Mapping[str, TensorSpec], parts: int = 0) -> dict[str, TensorSpec]:
        """The components of a checkpoint, in order, if they are what this scheme can read; ``parts`` as for
        ``tilings``.

        Raises:
            UnsupportedError: names the parameter and every component that is missing, surplus or different.
        """
        leaf = parameter.leaf
        order = self._called(self.names(), leaf)
        problems = self._codes_problems(parameter, found)
        problems += self._scale_problems(parameter, found, parts)
        problems += self._other_problems(parameter, found, parts)
        problems += [
            f"component {name!r} is not part of the format"
            for name in found.keys() - {*order, leaf}  # what has the parameter's own name was looked at with the codes
        ]
        if problems:
            raise UnsupportedError(f"{parameter.name}: " + "; ".join(sorted(problems)))
        return {name: found[name] for name in order if name in found}

    def _called(self, names: Iterable[str], leaf: str) -> list[str]:
        return [component_of(name, leaf) for name in names]

    def _codes_problems(self, parameter: Parameter, found: Mapping[str, TensorSpec]) -> list[str]:
        name, expected = component_of(self.codes_name, parameter.leaf), self.codes(parameter)
        problems = []
        if name not in found:
            problems.append(f"component {name!r} is missing, expected {expected}")
        elif found[name] != expected:
            problems.append(f"component {name!r} is {found[name]}, expected {expected}")
        if name != parameter.leaf and parameter.leaf in found:
            problems.append(f"component {parameter.leaf!r} is not part of the format, whose codes are {name!r}")
        return problems

    def _scale_problems(self, parameter: Parameter, found: Mapping[str, TensorSpec], parts: int) -> list[str]:
        names = [name for name in self._called(self.scale_names, parameter.leaf) if name in found]
        if not names:
            name = component_of(self.scale_name, parameter.leaf)
            return [f"component {name!r} is missing: the codes mean nothing without their scale"]
        if len(names) > 1:
            return [f"it has both {names[0]!r} and {names[1]!r}, expected one scale"]
        scale, shapes = found[names[0]], list(self.tilings(self.shape(parameter), parts))
        expected = " or ".join(str(list(shape)) for shape in shapes)
        if scale.shape not in shapes:
            why = "" if self.block_size is None else f" for blocks of {list(self.block_size)}"
            return [f"component {names[0]!r} is {scale}, expected the shape {expected}{why}"]
        if scale.dtype not in self.scale_dtypes:
            dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in self.scale_dtypes)
            one = "one of " if len(self.scale_dtypes) > 1 else ""
            return [f"component {names[0]!r} is {scale}, expected {one}{dtypes}"]
        return []

    def _other_problems(self, parameter: Parameter, found: Mapping[str, TensorSpec], parts: int) -> list[str]:
        leaf, shape = parameter.leaf, parameter.spec.shape
        ones = [(), (1,)] if len(shape) == 2 else [(shape[0], max(1, parts)), (shape[0], max(1, parts), 1)]
        problems = [
            f"component {name!r} is {found[name]}, expected one element"
            for name in self._called(self.extra_names, leaf)
            if name in found and found[name].shape not in ones
        ]
        if self.static and not any(name in found for name in self._called(ACTIVATION_NAMES, leaf)):
            name = component_of(ACTIVATION_NAMES[1], leaf)
            problems.append(f"component {name!r} is missing, which {self.static} needs")
        if self.factor_name is not None:
            name = component_of(self.factor_name, leaf)
            if name not in found:
                problems.append(f"component {name!r} is missing: the scales are relative to it")
            elif found[name].dtype != torch.float32 or found[name].shape not in ones:
                problems.append(f"component {name!r} is {found[name]}, expected one float32")
        return problems


def component_of(name: str, leaf: str) -> str:
    """What a parameter called ``leaf`` calls the component that beside a ``weight`` is ``name``; for experts as
    transformers has it: ``gate_up_proj_scale_inv``."""
    if leaf == "weight":
        return name
    if name == "scale":  # what comes of "weight_scale" has the shorter name
        return f"{leaf}_plain_scale"
    return leaf + name.removeprefix("weight") if name.startswith("weight") else f"{leaf}_{name}"
