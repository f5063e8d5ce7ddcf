"""Which module of a block can take the inverse of a group's scales, found by running the block.

AWQ's implementations have a table for each model family. Here a candidate has to prove itself: with channels of its
output multiplied by powers of two, which is exact, the inputs of the group change by just these, and with the group's
inputs divided by the same again, the block's output doesn't change at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from quantdock import CalibrationBlock, Parameter

_TRIES = 6  # modules before a group, the nearest first
_TOLERANCE = 0.02  # of the change that scaling the group's inputs alone makes


@dataclass(frozen=True, kw_only=True)
class Predecessor:
    """A module whose output, channel by channel, is what a group of layers is fed."""

    path: str
    """From the block on."""
    channels: Tensor
    """int64 ``[in]``: the channel of its output that each input of the group is."""
    parameter: Parameter | None = None
    """Its weight, if that is quantized, too."""
    offset: float = 0.0
    """Of a norm: what is added to its weight before multiplying; some architectures store the weight less 1."""


def find_predecessor(block: CalibrationBlock, group: Sequence[Parameter]) -> Predecessor | None:
    """The nearest module before a group that can take the inverse of its scales; ``None`` when none can.

    Args:
        block: in full precision; it is run several times and left as it is.
        group: parameters of linear layers, each ``[out, in]``, with as many inputs.
    """
    paths = [block.path(parameter) for parameter in group]
    inputs = inputs_of(block, group[0])
    for path in _candidates(block, paths, inputs):
        channels = _trace(block, path, paths, inputs)
        if channels is None or not _is_only_consumer(block, path, paths, channels):
            continue
        parameter = next((one for one in block.parameters.values() if block.path(one) == path), None)
        module = block.module.get_submodule(path)
        if isinstance(module, nn.Linear) or parameter is not None:
            return Predecessor(path=path, channels=channels, parameter=parameter)
        offset = _offset(block, path)
        if offset is not None:
            return Predecessor(path=path, channels=channels, offset=offset)
    return None


def inputs_of(block: CalibrationBlock, parameter: Parameter) -> int:
    """Inputs of a linear layer."""
    return block.weight(parameter).shape[1 if parameter.role == "linear" else 0]


def _candidates(block: CalibrationBlock, paths: Sequence[str], inputs: int) -> list[str]:
    """Modules that ran before the group, the nearest first, and have a weight that scales their output."""
    ran: list[str] = []
    linear = {block.path(parameter): parameter for parameter in block.parameters.values()}

    def outputs(path: str, module: nn.Module) -> int:
        weight = module._parameters.get("weight")
        if weight is None or module._modules:
            return 0
        if path in linear:
            return weight.shape[0 if linear[path].role == "linear" else 1]
        return len(weight) if weight.dim() == 1 or isinstance(module, nn.Linear) else 0

    # A module list of many experts has many linear layers; only few of them are asked.
    with _hooks(block, {path: lambda *_, path=path: ran.append(path) for path, _ in block.module.named_modules()}):
        block.forward(0)
    before = ran[: min((ran.index(path) for path in paths if path in ran), default=0)]
    nearest = list(dict.fromkeys(reversed(before)))
    fitting = [path for path in nearest if (n := outputs(path, block.module.get_submodule(path))) and inputs % n == 0]
    return [path for path in fitting if path not in paths][:_TRIES]


def _trace(block: CalibrationBlock, path: str, paths: Sequence[str], inputs: int) -> Tensor | None:
    """The channel of a module's output that each input of the group is; ``None`` when that isn't so."""
    outputs = _channels(block, path)
    consumer = next(iter(paths))
    plain = _fed(block, consumer, None)
    if plain is None or outputs is None:
        return None
    every = torch.arange(outputs)
    if outputs == inputs:  # each its own, or none
        bits = torch.randint(0, 2, (outputs,), generator=torch.Generator().manual_seed(0))
        doubled = _doubled(plain, _fed(block, consumer, (path, 1.0 + bits)))
        return every if doubled is not None and bool(((doubled == bits) | (doubled == 2)).all()) else None
    found = torch.zeros(inputs, dtype=torch.int64)
    for bit in range(max(1, (outputs - 1).bit_length())):
        doubled = _doubled(plain, _fed(block, consumer, (path, 1.0 + (every >> bit & 1))))
        if doubled is None or bool((doubled == 2).any()):
            return None
        found += doubled << bit
    return found if torch.equal(torch.bincount(found, minlength=outputs) > 0, every >= 0) else None


def _doubled(plain: Tensor, found: Tensor | None) -> Tensor | None:
    """For each column 0 if it stayed, 1 if it doubled, 2 if it has nothing but zeros; ``None`` if one did neither."""
    if found is None or found.shape != plain.shape:
        return None
    size = plain.norm(dim=0)
    stayed, doubled = ((found - factor * plain).norm(dim=0) <= 1e-3 * size for factor in (1, 2))
    result = torch.where(size == 0, 2, torch.where(stayed, 0, 1))
    return result if bool((stayed | doubled).all()) else None


def _is_only_consumer(block: CalibrationBlock, path: str, paths: Sequence[str], channels: Tensor) -> bool:
    """Whether nothing but the group notices that the module's output is scaled."""
    powers = torch.randint(-1, 2, (int(channels.max()) + 1,), generator=torch.Generator().manual_seed(1))
    scales = torch.pow(2.0, powers)
    undo = {one: _scaling_input(scales[channels]) for one in paths}
    before = block.forward(0).float()
    with _hooks(block, undo, pre=True):
        half = block.forward(0).float()
        with _hooks(block, {path: _scaling_output(1 / scales)}):
            whole = block.forward(0).float()
    change = (half - before).norm()
    return bool(change > 0 and (whole - before).norm() <= _TOLERANCE * change)


def _offset(block: CalibrationBlock, path: str) -> float | None:
    """What a norm adds to its weight before it multiplies; ``None`` when it does something else with it."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any], Tensor]] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen.append((args, kwargs, output))

    module = block.module.get_submodule(path)
    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        block.forward(0)
    finally:
        handle.remove()
    args, kwargs, output = seen[0]
    state = {name: tensor.detach() for name, tensor in module.named_parameters()}
    if state.keys() - {"weight", "bias"}:
        return None
    for offset in (0.0, 1.0):
        changed = {name: 2 * tensor + (offset if name == "weight" else 0) for name, tensor in state.items()}
        found = functional_call(module, changed, args, kwargs)
        if (found.float() - 2 * output.float()).norm() <= _TOLERANCE * output.float().norm():
            return offset
    return None


def _channels(block: CalibrationBlock, path: str) -> int | None:
    """The size of the last dimension of what a module gives."""
    found: list[int] = []

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            found.append(output.shape[-1])

    with _hooks(block, {path: hook}):
        block.forward(0)
    return found[0] if found else None


def _fed(block: CalibrationBlock, consumer: str, scaled: tuple[str, Tensor] | None) -> Tensor | None:
    """What a module is fed, float32 ``[rows, in]``, when the output of another is scaled."""
    seen: list[Tensor] = []
    hooks: dict[str, Callable[..., Any]] = {} if scaled is None else {scaled[0]: _scaling_output(scaled[1])}
    with _hooks(block, hooks):
        block.observe({consumer: lambda x: seen.append(x.float().cpu())}, batches=[0])
    return torch.cat(seen) if seen else None


def _scaling_output(scales: Tensor) -> Callable[..., Any]:
    return lambda module, args, output: output * scales.to(output.device, output.dtype)


def _scaling_input(scales: Tensor) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0] * scales.to(args[0].device, args[0].dtype), *args[1:])

    return hook


@contextmanager
def _hooks(block: CalibrationBlock, hooks: Mapping[str, Callable[..., Any]], *, pre: bool = False) -> Iterator[None]:
    handles = []
    try:
        for path, hook in hooks.items():
            module = block.module.get_submodule(path)
            handles.append(module.register_forward_pre_hook(hook) if pre else module.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()
