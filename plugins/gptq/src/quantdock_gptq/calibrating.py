"""GPTQ on one block: look at activations, layer after layer, and quantize each so that its outputs change little."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from quantdock import CalibrationBlock, CalibrationError, Parameter, UnsupportedError
from quantdock_gptq import rounding, words
from quantdock_gptq.config import GPTQConfig, Search, Settings
from quantdock_gptq.solving import Hessian, Prepared, Solution, prepare, solve

Components = Mapping[str, Tensor]
NEVER_FED = "no activations on the calibration data: rounded to nearest"


def quantize_block(
    block: CalibrationBlock, config: GPTQConfig, *, less_one: bool
) -> Iterator[tuple[Parameter, Components | None]]:
    """The components of a block's parameters, in order of execution; ``None`` for one that no activation reaches.

    Args:
        block: in full precision.
        config: of the load.
        less_one: whether zero points are stored less one.

    Raises:
        CalibrationError: activations can't be used; names the parameter.
    """
    subsets = block.groups()
    if config.true_sequential is False:
        subsets = [[parameter for subset in subsets for parameter in subset]]
    for subset in subsets:
        names = {parameter.name for parameter in subset}
        sharing = [
            same
            for group in block.same_input()
            if (same := [parameter for parameter in group if parameter.name in names])
        ]
        hessians = _look(block, sharing)
        while sharing:
            same, hessian = sharing.pop(0), hessians.pop(0)
            yield from _quantize(block, same, hessian, config, less_one)


def _look(block: CalibrationBlock, sharing: Sequence[Sequence[Parameter]]) -> list[Hessian]:
    """A Hessian for each group of parameters that are fed the same activations, in one run of the block."""
    hessians = [Hessian(inputs_of(same[0]), block.weight(same[0]).device) for same in sharing]
    block.observe({block.path(same[0]): hessian.add for same, hessian in zip(sharing, hessians, strict=True)})
    return hessians


def _quantize(
    block: CalibrationBlock, same: Sequence[Parameter], hessian: Hessian, config: GPTQConfig, less_one: bool
) -> Iterator[tuple[Parameter, Components | None]]:
    ready: dict[tuple[Settings, Search], Prepared] = {}
    for parameter in same:
        if not hessian.rows:
            block.note(parameter, NEVER_FED)
            yield parameter, None
            continue
        settings, search = config.of(parameter.module), config.search(parameter.module)
        assert settings is not None, "refusal() leaves it alone"
        try:
            if (settings, search) not in ready:
                ready = {(settings, search): prepare(hessian.mean(), settings, search)}
        except CalibrationError as error:
            raise CalibrationError(str(error), block=block.name, parameter=parameter.name) from error
        weight = block.weight(parameter)
        matrix = weight if parameter.role == "linear" else weight.t()
        solution = solve(matrix, ready[settings, search], settings, search)
        if not bool(torch.isfinite(solution.scales).all()):
            raise UnsupportedError(
                f"{parameter.name} has weights that are infinite, not numbers, or too large for a scale in "
                f"{rounding.SCALE_DTYPE}; leave it out, or repair the checkpoint"
            )
        yield parameter, _packed(solution, settings.bits, less_one)


def _packed(solution: Solution, bits: int, less_one: bool) -> Components:
    return {
        "qweight": words.pack(solution.codes, bits),
        "qzeros": words.encode_zeros(solution.zeros, bits, less_one=less_one),
        "scales": solution.scales,
        "g_idx": solution.g_idx,
    }


def calibration_bytes(parameters: Sequence[Parameter], rows: int, *, sequential: bool) -> int:
    """Bytes that ``quantize_block`` allocates at the most.

    Hessians of layers side by side (experts) are there at once, those of layers behind one another aren't.
    """
    if not parameters:
        return 0
    squares = {parameter.name: 4 * inputs_of(parameter) ** 2 for parameter in parameters}
    siblings = Counter(re.sub(r"\.\d+\.", ".*.", name) for name in squares)
    if sequential:
        hessians = max(siblings[re.sub(r"\.\d+\.", ".*.", name)] * square for name, square in squares.items())
    else:
        hessians = sum(squares.values())
    # The Hessian in order, its factor, the inverse and the inverse's; the weight in float32 twice, its codes twice.
    largest = max(4 * square for square in squares.values()) + max(12 * p.spec.numel for p in parameters)
    return hessians + largest + 4 * rows * max(map(inputs_of, parameters))


def inputs_of(parameter: Parameter) -> int:
    """Features that a layer is fed."""
    return parameter.spec.shape[1 if parameter.role == "linear" else 0]
