"""GPTQ on one block: look at activations, layer after layer, and quantize each so that its outputs change little."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from quantdock import CalibrationBlock, CalibrationError, Parameter, linears
from quantdock_gptq import nearest, words
from quantdock_gptq.choosing import Choosing
from quantdock_gptq.config import GPTQConfig, Search, Settings
from quantdock_gptq.solving import Hessian, Prepared, Solution, prepare, solve

Components = Mapping[str, Tensor]
NEVER_FED = "no activations on the calibration data: rounded to nearest"


@dataclass(frozen=True, kw_only=True)
class Method:
    """What calibration needs to know of a load."""

    config: GPTQConfig
    choosing: Choosing
    less_one: bool
    """Whether zero points are stored less one."""

    def experts(self, parameter: Parameter) -> linears.Experts | None:
        """Which linear layers a parameter is stored as, if those are experts."""
        return self.choosing.known_experts(parameter)


def quantize_block(block: CalibrationBlock, method: Method) -> Iterator[tuple[Parameter, Components | None]]:
    """The components of a block's parameters, in order of execution; ``None`` for one that no activation reaches.

    Args:
        block: in full precision.
        method: of the load.

    Raises:
        CalibrationError: activations can't be used; names the parameter.
    """
    subsets = block.groups()
    if method.config.true_sequential is False:
        subsets = [[parameter for subset in subsets for parameter in subset]]
    for subset in subsets:
        names = {parameter.name for parameter in subset}
        sharing = [
            same
            for group in block.same_input()
            if (same := [parameter for parameter in group if parameter.name in names])
        ]
        hessians = _look(block, sharing, method)
        while sharing:
            same, found = sharing.pop(0), hessians.pop(0)
            if isinstance(found, Hessian):
                yield from _quantize(block, same, found, method)
            else:
                yield same[0], _quantize_experts(block, same[0], found, method)


def _look(
    block: CalibrationBlock, sharing: Sequence[Sequence[Parameter]], method: Method
) -> list[Hessian | list[Hessian]]:
    """A Hessian for each group of parameters that are fed the same activations, or one for each expert."""
    found: list[Hessian | list[Hessian]] = []
    layers: dict[str, Callable[[Tensor], None]] = {}
    stacks: dict[str, Callable[[int, Tensor], None]] = {}
    for parameter, *_ in sharing:
        experts, device = method.experts(parameter), block.weight(parameter).device
        if experts is None:
            hessian = Hessian(inputs_of(parameter), device)
            layers[block.path(parameter)] = hessian.add
            found.append(hessian)
        else:
            each = [Hessian(inputs_of(parameter), device) for _ in experts.names]
            stacks[parameter.name] = partial(_add, each)
            found.append(each)
    if layers:
        block.observe(layers)
    if stacks:
        block.observe_experts(stacks)
    return found


def _add(hessians: Sequence[Hessian], expert: int, rows: Tensor) -> None:
    hessians[expert].add(rows)


def _quantize(
    block: CalibrationBlock, same: Sequence[Parameter], hessian: Hessian, method: Method
) -> Iterator[tuple[Parameter, Components | None]]:
    ready = _Ready(block, hessian)
    for parameter in same:
        if not hessian.rows:
            block.note(parameter, NEVER_FED)
            yield parameter, None
            continue
        weight = block.weight(parameter)
        matrix = weight if parameter.role == "linear" else weight.t()
        yield parameter, ready.components(parameter, matrix, parameter.module, method)


def _quantize_experts(
    block: CalibrationBlock, parameter: Parameter, hessians: list[Hessian], method: Method
) -> Components | None:
    """Each linear layer that a parameter is stored as, by the tokens that its expert was fed."""
    experts, weight = method.experts(parameter), block.weight(parameter)
    assert experts is not None
    left = [str(number) for number, hessian in enumerate(hessians) if not hessian.rows]
    if len(left) == len(hessians):
        block.note(parameter, NEVER_FED)
        return None
    if left:
        block.note(parameter, f"experts {', '.join(left)}: {NEVER_FED}")
    result = None
    for number, names in enumerate(experts.names):
        ready = _Ready(block, hessians.pop(0))
        for part, name in enumerate(names):
            rows = weight[number, part * experts.shape[0] : (part + 1) * experts.shape[0]]
            if ready.rows:
                made = ready.components(parameter, rows, name.rpartition(".")[0], method)
            else:
                settings = method.choosing.settings(parameter)
                made = nearest.layer(parameter.name, rows, settings, less_one=method.less_one)
            result = result or experts.room(made)
            for component, tensor in made.items():
                result[component][number, part] = tensor
    assert result is not None
    return {f"{parameter.leaf}_{component}": tensor for component, tensor in result.items()}


class _Ready:
    """A Hessian, and what has been prepared of it for the last settings."""

    def __init__(self, block: CalibrationBlock, hessian: Hessian) -> None:
        self.rows = hessian.rows
        self._block, self._hessian = block, hessian
        self._prepared: dict[tuple[Settings, Search], Prepared] = {}

    def components(self, parameter: Parameter, matrix: Tensor, module: str, method: Method) -> Components:
        """A weight ``[outputs, inputs]``, solved and packed."""
        settings, search = method.choosing.settings(parameter), method.config.search(module)
        try:
            if (settings, search) not in self._prepared:
                self._prepared = {(settings, search): prepare(self._hessian.mean(), settings, search)}
        except CalibrationError as error:
            raise CalibrationError(str(error), block=self._block.name, parameter=parameter.name) from error
        solution = solve(matrix, self._prepared[settings, search], settings, search)
        if not bool(torch.isfinite(solution.scales).all()):
            raise nearest.unscalable(parameter.name)
        return _packed(solution, settings.bits, method.less_one)


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
    each = {parameter.name: _matrices(parameter) for parameter in parameters}
    siblings: Counter[str] = Counter()
    for name, count in each.items():
        siblings[_place(name)] += count
    if sequential:
        hessians = max(siblings[_place(name)] * square for name, square in squares.items())
    else:
        hessians = sum(each[name] * square for name, square in squares.items())
    # The Hessian in order, and its factor, or what these become; the weight in float32 twice, its codes twice.
    weights = max(12 * parameter.spec.numel // _matrices(parameter) for parameter in parameters)
    largest = max(2 * square for square in squares.values()) + weights
    return hessians + largest + 4 * rows * max(map(inputs_of, parameters))


def _place(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


def _matrices(parameter: Parameter) -> int:
    return parameter.spec.shape[0] if len(parameter.spec.shape) == 3 else 1


def inputs_of(parameter: Parameter) -> int:
    """Features that a layer, or an expert, is fed."""
    return parameter.spec.shape[0 if parameter.role == "linear-transposed" else -1]
