"""Run one unit as a whole, and put what comes of it into the model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from quantdock.conversion import Assembly
from quantdock.errors import LoadError, PluginError, QuantdockError
from quantdock.joining import Joined
from quantdock.pagecache import release
from quantdock.placement import DISK
from quantdock.profiling import Recorder, current
from quantdock.quantizer import Quantizer
from quantdock.staging import Staging
from quantdock.tensors import Parameter, StoredTensor, TensorSpec
from quantdock.units import Target, Unit

Convert = Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]
QuantizeHook = Callable[[Parameter, torch.Tensor], Mapping[str, torch.Tensor] | None]


@dataclass(kw_only=True)
class Runner:
    """Reads, converts, quantizes and places. Used from several threads at once, each with a ``Staging`` of its own."""

    model: torch.nn.Module
    quantize_hooks: Mapping[int, QuantizeHook]
    """id of a quantizer -> the ``quantize_param`` hook that asks it and the stage plugins, nobody else."""
    offload_dir: str | None = None
    offload_index: dict[str, Any] = field(default_factory=dict)
    recorder: Recorder = field(default_factory=current)
    """Who is told what the threads do; asked for in the thread that calls ``load``."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, unit: Unit, staging: Staging) -> None:
        """Run a unit.

        Raises:
            LoadError: names file, stored tensors, parameter and plugin.
        """
        for target, make in self._makers(unit, staging):
            with located(unit, target), staging.on(target.device):
                make()

    def _makers(self, unit: Unit, staging: Staging) -> Iterator[tuple[Target, Callable[[], None]]]:
        """Each target, with what makes it."""
        if unit.conversion is None:
            install = self._install_stored if unit.joined is None else partial(self._install_joined, unit.joined)
            yield unit.targets[0], partial(install, unit, staging)
        elif (function := unit.conversion.function) is not None:
            results: dict[str, torch.Tensor] = {}
            yield unit.targets[0], partial(self._convert, function, unit, results)
            for target in unit.targets:
                yield target, partial(self._finish_result, target, results, staging)
        else:
            assert unit.conversion.assemblies is not None
            sources = {source.name: source for source in unit.sources}
            for target in unit.targets:
                assembly = unit.conversion.assemblies[target.parameter.name]
                yield target, partial(self._assemble, target, assembly, sources, staging)

    def _install_stored(self, unit: Unit, staging: Staging) -> None:
        (target,) = unit.targets
        assert target.decision.chosen is not None
        assert isinstance(target.device, torch.device), "stored components aren't offloaded"
        name = target.parameter.name
        with self.recorder.span("read", name, unit.stored_nbytes):
            tensors = {
                component: staging.moved(source.read(), target.device, drop=source.reader.maps)
                for component, source in zip(unit.components, unit.sources, strict=True)
            }
        with self.recorder.span("place", name):
            target.decision.chosen.quantizer.install(self.model, target.parameter, tensors)

    def _install_joined(self, joined: Joined, unit: Unit, staging: Staging) -> None:
        """Read each stored tensor straight into its place in a component."""
        (target,) = unit.targets
        assert target.decision.chosen is not None
        assert isinstance(target.device, torch.device), "stored components aren't offloaded"
        name, sources = target.parameter.name, {source.name: source for source in unit.sources}
        tensors = {}
        for component, spec in joined.specs.items():
            tensors[component] = torch.empty(spec.shape, dtype=spec.dtype, device=target.device)
            self._fill(tensors[component], name, joined.assemblies[component], sources, staging)
        with self.recorder.span("place", name):
            target.decision.chosen.quantizer.install(self.model, target.parameter, tensors)

    def _convert(self, function: Convert, unit: Unit, results: dict[str, torch.Tensor]) -> None:
        name = unit.targets[0].parameter.name
        with self.recorder.span("read", name, unit.stored_nbytes):
            sources = {source.name: source.read() for source in unit.sources}
        with self.recorder.span("convert", name, unit.stored_nbytes):
            results.update(function(sources))

    def _assemble(
        self, target: Target, assembly: Assembly, sources: Mapping[str, StoredTensor], staging: Staging
    ) -> None:
        spec = target.parameter.spec
        first = assembly.pieces[0]
        if len(assembly.pieces) == 1 and first.whole and sources[first.source].spec == spec:
            source = sources[first.source]
            with self.recorder.span("read", target.parameter.name, 0 if source.reader.maps else source.stored_nbytes):
                tensor = source.read()
            self._finish(target, tensor, staging, drop=source.reader.maps)
            if source.reader.maps and target.action != "map":
                release(tensor)
            return
        result = torch.empty(spec.shape, dtype=spec.dtype, device="cpu" if target.device == DISK else target.device)
        self._fill(result, target.parameter.name, assembly, sources, staging)
        self._finish(target, result, staging)

    def _fill(
        self,
        result: torch.Tensor,
        name: str,
        assembly: Assembly,
        sources: Mapping[str, StoredTensor],
        staging: Staging,
    ) -> None:
        for piece in assembly.pieces:
            source = sources[piece.source]
            with self.recorder.span("read", name, source.stored_nbytes):
                view = piece.of(source.read())
                staging.copy(view, result[piece.into] if piece.into else result, drop=source.reader.maps)

    def _finish_result(self, target: Target, results: dict[str, torch.Tensor], staging: Staging) -> None:
        name, spec = target.parameter.name, target.parameter.spec
        if name not in results:
            raise PluginError(f"the conversion made {', '.join(results)}, but not {name!r}, which it had announced")
        if tuple(results[name].shape) != spec.shape:
            raise PluginError(f"the conversion made {name!r} as {TensorSpec.of(results[name])}, expected {spec}")
        self._finish(target, results[name], staging)

    def _finish(self, target: Target, tensor: torch.Tensor, staging: Staging, *, drop: bool = False) -> None:
        """Quantize and install a tensor in full precision; ``drop`` says that it is a view of a mapped file."""
        parameter = target.parameter
        if not isinstance(target.device, torch.device):
            self._offload(parameter, tensor.to(parameter.spec.dtype))
            return
        with self.recorder.span("convert", parameter.name, tensor.nbytes):
            tensor = staging.moved(tensor, target.device, drop=drop).to(parameter.spec.dtype)
        chosen = target.decision.chosen
        if chosen is None:
            with self.recorder.span("place", parameter.name, tensor.nbytes):
                install_plain(self.model, parameter, tensor)
            return
        # Of a view of a mapped file, the pages are read here.
        name, read = parameter.name, tensor.nbytes if drop else 0
        with self.recorder.span("read", name, read), self.recorder.span("quantize", name, tensor.nbytes):
            components = self.quantize_hooks[id(chosen.quantizer)](parameter, tensor)
        self.install(target, components)

    def install(self, target: Target, components: Mapping[str, torch.Tensor] | None) -> None:
        """Hand a quantizer's components back to it, for the model, if they are what it had declared.

        Raises:
            PluginError: they aren't.
        """
        assert target.decision.chosen is not None
        quantizer = target.decision.chosen.quantizer
        check_components(quantizer, target.parameter, components)
        assert components is not None
        with self.recorder.span("place", target.parameter.name):
            quantizer.install(self.model, target.parameter, components)

    def _offload(self, parameter: Parameter, tensor: torch.Tensor) -> None:
        from accelerate.utils import offload_weight

        assert self.offload_dir is not None
        with self._lock:
            offload_weight(tensor, parameter.name, self.offload_dir, index=self.offload_index)


@contextmanager
def located(unit: Unit, target: Target) -> Iterator[None]:
    """Raise whatever goes wrong in the block as a ``LoadError`` that says where."""
    try:
        yield
    except Exception as error:
        message = str(error) if isinstance(error, QuantdockError) else f"{type(error).__name__}: {error}"
        chosen = target.decision.chosen
        raise LoadError(
            f"loading stopped: {message}",
            parameter=target.parameter.name,
            stored=[source.name for source in unit.sources],
            file=unit.sources[0].file if unit.sources else None,
            plugin=None if chosen is None else f"{chosen.label} ({chosen.offer.origin})",
        ) from error


def check_components(
    quantizer: Quantizer[Any], parameter: Parameter, components: Mapping[str, torch.Tensor] | None
) -> None:
    """A plugin's declaration is its word: placement and the prediction rely on it.

    Raises:
        PluginError: it made something else.
    """
    if components is None:
        raise PluginError(
            f"{type(quantizer).__name__}.quantize_param returned None for {parameter.name!r}, which it took"
        )
    layout = quantizer.layout(parameter)
    made = {name: TensorSpec.of(tensor) for name, tensor in components.items()}
    if not layout.fits(made):
        raise PluginError(
            f"{type(quantizer).__name__} made {_listed(made)} for {parameter.name!r}, but its layout declares "
            f"{_listed(layout.components)}"
        )


def _listed(specs: Mapping[str, TensorSpec]) -> str:
    return ", ".join(f"{name}: {spec}" for name, spec in sorted(specs.items()))


def install_plain(model: torch.nn.Module, parameter: Parameter, tensor: torch.Tensor) -> None:
    """Put a full-precision tensor into its slot."""
    module = parameter.owner(model)
    if parameter.leaf in module._buffers:
        module._buffers[parameter.leaf] = tensor
    else:
        value = torch.nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
        module.register_parameter(parameter.leaf, value)
