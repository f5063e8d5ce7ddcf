"""AWQ on one block: look at activations, scale up what they say matters, cut off what doesn't, round."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantdock import CalibrationBlock, CalibrationError, Parameter
from quantdock_awq import search
from quantdock_awq.predecessors import Predecessor, find_predecessor, inputs_of
from quantdock_awq.rounding import Rounded, round_to_nearest

_UNCLIPPED = ("q_", "k_", "query", "key", "Wqkv")
"""Parts of the names of layers whose groups AWQ doesn't cut off: queries and keys meet in products."""

Size = Callable[[Parameter], int]
Components = Callable[[Parameter, Rounded], Mapping[str, Tensor]]


@dataclass(kw_only=True, eq=False)
class _Group:
    """Layers whose inputs are scaled alike."""

    parameters: Sequence[Parameter]
    inputs: search.Inputs
    predecessor: Predecessor | None
    """Who takes the inverse; ``None`` when nobody can, and inputs stay as they are."""
    scales: Tensor
    """What inputs are divided by, float32 ``[in]``."""


def calibrate(
    block: CalibrationBlock, size: Size, *, zero_point: bool, components: Components
) -> Iterator[tuple[Parameter, Mapping[str, Tensor]]]:
    """Every parameter of a block, with its components.

    Args:
        block: in full precision. What precedes its layers is written to, so that scales cancel out.
        size: inputs per group.
        zero_point: whether groups have zero points.
        components: makes them.
    """
    groups = _groups(block)
    _observe(block, groups)
    divisors: dict[str, Tensor] = {}
    for group in groups:
        if group.predecessor is not None and group.inputs.rows:
            found = search.search_scales(
                [_weight(block, parameter) for parameter in group.parameters],
                group.inputs,
                size(group.parameters[0]),
                zero_point=zero_point,
                channels=group.predecessor.channels,
            )
            group.scales = _take_inverse(block, group.predecessor, found, divisors)
    for group in groups:
        for parameter in group.parameters:
            weight = _weight(block, parameter).float() * group.scales
            if parameter.name in divisors:
                weight /= divisors[parameter.name][:, None]
            yield parameter, components(parameter, _round(parameter, weight, group, size(parameter), zero_point))


def working_bytes(shapes: Sequence[tuple[int, int]], rows: int) -> int:
    """Bytes that ``calibrate`` allocates at the most, for layers ``[out, in]`` and batches of so many rows."""
    if not shapes:
        return 0
    moments = sum(4 * inputs**2 for _, inputs in shapes)
    whole = max(outputs * inputs for outputs, inputs in shapes)
    widest = max(inputs for _, inputs in shapes)
    return moments + 10 * whole + 8 * widest * (widest + rows) + search.WORKING_BYTES


def _groups(block: CalibrationBlock) -> list[_Group]:
    """All layers, in groups with somebody before them to take the inverse of scales, where there is one."""
    finer = block.same_input()
    result = []
    for siblings in block.groups():
        predecessor = find_predecessor(block, siblings)
        if predecessor is not None:
            result.append(_group(block, siblings, predecessor))
            continue
        names = {parameter.name for parameter in siblings}
        parts = [part for part in finer if part[0].name in names]
        for part in parts:
            result.append(_group(block, part, find_predecessor(block, part) if len(parts) > 1 else None))
    return result


def _group(block: CalibrationBlock, parameters: Sequence[Parameter], predecessor: Predecessor | None) -> _Group:
    width, device = inputs_of(block, parameters[0]), block.weight(parameters[0]).device
    return _Group(
        parameters=parameters,
        inputs=search.Inputs(width, device),
        predecessor=predecessor,
        scales=torch.ones(width, dtype=torch.float32, device=device),
    )


def _observe(block: CalibrationBlock, groups: Sequence[_Group]) -> None:
    """Fill in what the inputs of all groups are like, in one pass.

    Raises:
        CalibrationError: they are infinite, or not numbers.
    """
    inputs = {parameter.name: group.inputs for group in groups for parameter in group.parameters}
    see = {block.path(same[0]): inputs[same[0].name].add for same in block.same_input()}
    block.observe(see)
    for group in groups:
        if not group.inputs.is_finite():
            raise CalibrationError(
                "activations are infinite or not numbers; look at the model in full precision, in float32 or bfloat16, "
                "and at the calibration data",
                block=block.name,
                parameter=group.parameters[0].name,
            )
        for parameter in group.parameters:
            if not group.inputs.rows:
                block.note(parameter, "no calibration data came through it; rounded to nearest")
            elif group.predecessor is None:
                block.note(parameter, "nothing before it can take the inverse of scales; only cut off and rounded")


def _weight(block: CalibrationBlock, parameter: Parameter) -> Tensor:
    """``[out, in]``"""
    weight = block.weight(parameter)
    return weight if parameter.role == "linear" else weight.t()


def _round(parameter: Parameter, weight: Tensor, group: _Group, size: int, zero_point: bool) -> Rounded:
    layer = parameter.module.rpartition(".")[2]
    if not group.inputs.rows or any(part in layer for part in _UNCLIPPED):
        return round_to_nearest(weight, size, zero_point=zero_point)
    moments = search.within_groups(group.inputs.moments, group.scales, size)
    return search.round_clipped(weight, moments, size, zero_point=zero_point)


def _take_inverse(
    block: CalibrationBlock, predecessor: Predecessor, found: Tensor, divisors: dict[str, Tensor]
) -> Tensor:
    """Divide what precedes a group by its scales.

    Args:
        block: written to, but not where a weight is quantized itself.
        predecessor: of the group.
        found: scales, float32 ``[in]``; alike for inputs that are the same channel.
        divisors: parameter that is quantized itself -> what to divide its outputs by; added to.

    Returns:
        The scales that cancel out with what was written, whose dtype rounds.
    """
    channels = predecessor.channels.to(found.device)
    by_channel = found.new_ones(int(channels.max()) + 1)
    by_channel[channels] = found
    module = block.module.get_submodule(predecessor.path)
    bias = module._parameters.get("bias")
    if predecessor.parameter is not None:
        divisors[predecessor.parameter.name] = by_channel
    else:
        weight = module._parameters["weight"]
        assert weight is not None
        divisor = by_channel.view(-1, *[1] * (weight.dim() - 1))
        old = weight.detach().float() + predecessor.offset
        new = (old / divisor - predecessor.offset).to(weight.dtype)
        block.write(f"{predecessor.path}.weight", new)
        if weight.dim() == 1:
            ratio = old / (new.float() + predecessor.offset)
            by_channel = torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, by_channel)
    if bias is not None:
        block.write(f"{predecessor.path}.bias", (bias.detach().float() / by_channel).to(bias.dtype))
    return by_channel[channels]
