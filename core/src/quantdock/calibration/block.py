"""A block in full precision, as a quantizer sees it while it calibrates."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from quantdock.calibration.capturing import Call
from quantdock.calibration.watching import watched
from quantdock.errors import CalibrationError
from quantdock.tensors import Parameter, TensorSpec

logger = logging.getLogger("quantdock")

See = Callable[[torch.Tensor], None]
SeeExpert = Callable[[int, torch.Tensor], None]


class _SeenEnough(Exception):  # noqa: N818 - no error
    """Every watched module was called; what follows in the block isn't needed."""


@dataclass(kw_only=True, eq=False)
class CalibrationBlock:
    """One block of the model in full precision, with the inputs that the quantized blocks before it give."""

    name: str
    """Its path in the model."""
    module: nn.Module
    """The block itself, in eval mode and on its device. Register hooks of your own, and remove them."""
    parameters: Mapping[str, Parameter]
    """The parameters in it that the quantizer has to quantize, by their full names."""
    hidden: Sequence[torch.Tensor] = field(repr=False)
    """Its input, batch by batch: ``[samples, tokens, features]``."""
    calls: Sequence[Call] = field(repr=False)
    """Its other arguments, batch by batch."""
    notes: dict[str, str] = field(default_factory=dict)
    """Parameter -> what ``note`` was told of it."""
    _same: list[list[Parameter]] | None = field(default=None, repr=False)
    _once: frozenset[str] = frozenset()

    @property
    def batches(self) -> int:
        """How many there are; the samples of one are equally long."""
        return len(self.hidden)

    @property
    def rows(self) -> int:
        """Tokens of all batches."""
        return sum(tensor.numel() // tensor.shape[-1] for tensor in self.hidden)

    def path(self, parameter: Parameter) -> str:
        """Path of the module that owns a parameter, from the block on; empty for the block itself."""
        return parameter.module[len(self.name) :].removeprefix(".")

    def owner(self, parameter: Parameter) -> nn.Module:
        """The full-precision module that owns a parameter."""
        return self.module.get_submodule(self.path(parameter))

    def weight(self, parameter: Parameter) -> torch.Tensor:
        """The parameter in full precision as it is now. Don't write into it: it may be a view of the file."""
        tensor = self.owner(parameter)._parameters[parameter.leaf]
        assert tensor is not None
        return tensor.detach()

    def forward(self, batch: int) -> torch.Tensor:
        """The hidden states that the block, as it is now, makes of a batch."""
        return self.calls[batch].run(self.module, self.hidden[batch])

    def observe(self, see: Mapping[str, See], *, batches: Iterable[int] | None = None) -> None:
        """Run batches through the block and look at what submodules are fed.

        What comes behind the last submodule isn't computed where its order is known (see ``groups``).

        Args:
            see: path of a submodule, from the block on -> called with its first input, ``[rows, features]``, each time
                the submodule is called. Don't write into it.
            batches: which ones; all if not given.
        """
        left: set[str] = set()

        def watch(path: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                found = _first_tensor(args, kwargs)
                see[path](found.reshape(-1, found.shape[-1]))
                left.discard(path)
                if not left and see.keys() <= self._once:
                    raise _SeenEnough

            return hook

        with self._hooked({path: watch(path) for path in see}):
            for batch in range(self.batches) if batches is None else batches:
                left.update(see)
                with suppress(_SeenEnough):
                    self.forward(batch)

    def observe_experts(self, see: Mapping[str, SeeExpert]) -> None:
        """Run all batches through the block and look at what experts are fed.

        Args:
            see: name of a parameter ``[experts, outputs, inputs]`` -> called with the number of an expert and what is
                multiplied with its matrix, ``[rows, inputs]``; not at all for an expert that no token is routed to.
                Don't write into it.

        Raises:
            CalibrationError: its module doesn't multiply with one expert at a time.
        """
        with self._watched({self.parameters[name]: one for name, one in see.items()}):
            for batch in range(self.batches):
                self.forward(batch)

    def same_input(self) -> list[list[Parameter]]:
        """The parameters in groups that are fed the very same tensor, in order of execution.

        Experts in one parameter are alone. Those that are never fed anything come last, each alone.
        """
        if self._same is None:
            self._same = self._find_same()
        return self._same

    def groups(self) -> list[list[Parameter]]:
        """As ``same_input``, with parameters at the same place in siblings of a module list (experts) in one group.

        The groups depend on one another in this order; siblings don't, as each of them is fed by its own predecessor.
        """
        merged: dict[str, list[Parameter]] = {}
        for group in self.same_input():
            merged.setdefault(self._place(group[0]), []).extend(group)
        return list(merged.values())

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Replace a full-precision parameter of the block; one that isn't quantized stays so in the loaded model.

        Args:
            name: from the block on, such as ``input_layernorm.weight``.
            tensor: of the same dtype and shape, on the same device.
        """
        path, _, leaf = name.rpartition(".")
        module = self.module.get_submodule(path)
        old = module._parameters[leaf]
        assert old is not None, f"{name} has no values"
        if TensorSpec.of(tensor) != TensorSpec.of(old):
            raise CalibrationError(
                f"{self.name}.{name} is {TensorSpec.of(old)}, and was to become {TensorSpec.of(tensor)}"
            )
        module.register_parameter(leaf, nn.Parameter(tensor.detach(), requires_grad=old.requires_grad))

    def note(self, parameter: Parameter, text: str) -> None:
        """Say something about a parameter in the ledger of the load; a warning in the log says it at once."""
        self.notes[parameter.name] = text
        logger.warning("%s: %s", parameter.name, text)

    def _find_same(self) -> list[list[Parameter]]:
        """Run batches until every parameter's module was called, or there are no more."""
        groups: list[list[Parameter]] = []
        group_of: dict[str, list[Parameter]] = {}
        counts: dict[str, int] = {}
        by_path: dict[str, list[Parameter]] = {}
        experts: dict[Parameter, SeeExpert] = {}
        fed: list[tuple[str, torch.Tensor]] = []  # holds the tensors, so that no other one takes an address

        def watch(path: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                fed.append((path, _first_tensor(args, kwargs)))

            return hook

        def watch_experts(name: str) -> SeeExpert:
            return lambda expert, rows: fed.append((name, rows))

        for parameter in self.parameters.values():
            if len(parameter.spec.shape) == 3:
                by_path[parameter.name] = [parameter]
                experts[parameter] = watch_experts(parameter.name)
            else:
                by_path.setdefault(self.path(parameter), []).append(parameter)
        hooks = {path: watch(path) for path, found in by_path.items() if found[0] not in experts}
        with self._hooked(hooks), self._watched(experts):
            for batch in range(self.batches):
                self.forward(batch)
                places: dict[tuple[Any, ...], list[Parameter]] = {}
                for path, tensor in fed:
                    counts[path] = counts.get(path, 0) + 1
                    key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
                    group = places.setdefault(key, group_of.get(path, []))
                    if path not in group_of:
                        if not group:
                            groups.append(group)
                        group_of[path] = group
                        group += by_path[path]
                fed.clear()
                if group_of.keys() == by_path.keys():
                    once = (path for path, count in counts.items() if batch == 0 and count == 1)
                    self._once = frozenset(path for path in once if path in hooks)
                    break
        return groups + [[one] for path, found in by_path.items() if path not in group_of for one in found]

    def _place(self, parameter: Parameter) -> str:
        """The parameter's name with the numbers of siblings left out."""
        parts: list[str] = []
        module = self.module
        for part in filter(None, self.path(parameter).split(".")):
            parts.append("*" if isinstance(module, nn.ModuleList) else part)
            module = module.get_submodule(part)
        return ".".join([*parts, parameter.leaf])

    @contextmanager
    def _watched(self, experts: Mapping[Parameter, SeeExpert]) -> Iterator[None]:
        """Let modules find parameters that tell what they are multiplied with."""
        owners = [(self.owner(parameter), parameter.leaf) for parameter in experts]
        try:
            for (module, leaf), (parameter, see) in zip(owners, experts.items(), strict=True):
                module.__dict__[leaf] = watched(self.weight(parameter), see, parameter.name)
            yield
        finally:
            for module, leaf in owners:
                module.__dict__.pop(leaf, None)

    @contextmanager
    def _hooked(self, hooks: Mapping[str, Callable[..., None]]) -> Iterator[None]:
        handles = []
        try:
            for path, hook in hooks.items():
                module = self.module.get_submodule(path)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()


def _first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    found = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
    if found is None:
        raise CalibrationError("a module is called without a tensor, so there are no activations to look at")
    return found
