"""Core's own answers to the hooks; registered first in each load, so they are asked last."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from quantdock.architecture import Architecture, LoadOutcome, Skeleton
from quantdock.checkpoint import Checkpoint
from quantdock.config import CONFIG_NAME, ConfigObject, ModelConfig, read_config
from quantdock.errors import ConfigError
from quantdock.find_checkpoint import find_checkpoint
from quantdock.hookspecs import hookimpl
from quantdock.options import LoadOptions, as_path
from quantdock.placement import device_of
from quantdock.source import Source


class CoreDefaults:
    """Reads ``config.json``, finds safetensors files, builds the user's own module, puts the model in eval mode."""

    @hookimpl
    def resolve_config(self, source: Source, options: LoadOptions) -> ModelConfig | None:
        """``config=`` (an object, a mapping, a path) or the source's ``config.json``."""
        if isinstance(options.config, Mapping):
            return ModelConfig(data=dict(options.config), origin="config=")
        if isinstance(options.config, str | Path):
            path = as_path(options.config)
            return read_config(path / CONFIG_NAME if path.is_dir() else path)
        if isinstance(options.config, ConfigObject):
            return ModelConfig(data=options.config.to_dict(), origin="config=", native=options.config)
        path_found = source.find(CONFIG_NAME)
        if path_found is not None:
            return read_config(path_found)
        if options.model is not None:
            return ModelConfig(data={}, origin=f"{source.name} (which has no {CONFIG_NAME})")
        raise ConfigError(
            f"{source.name}: there is no {CONFIG_NAME}, so the architecture isn't known. Name a folder or repository "
            "that has one, or pass config= or model="
        )

    @hookimpl
    def find_checkpoints(self, source: Source, options: LoadOptions) -> Checkpoint | None:
        """Safetensors files, single or sharded; pickles when ``use_safetensors=False``."""
        return find_checkpoint(source, variant=options.variant, use_safetensors=options.use_safetensors)

    @hookimpl
    def build_model(self, config: ModelConfig, options: LoadOptions) -> Skeleton | None:
        """The user's ``model=`` factory, on the meta device."""
        if options.model is None:
            return None
        with torch.device("meta"), _default_dtype(options.settled_dtype):
            model = _call_factory(options.model, config)
        buffers = _own_buffers(model)
        if buffers:
            # What a module computes for itself (masks, frequencies) isn't in any checkpoint: take it from a twin whose
            # parameters are on meta and whose buffers are real.
            from accelerate import init_empty_weights

            with init_empty_weights(include_buffers=False):
                twin = _call_factory(options.model, config)
            # Computed in the usual precision and then cast, as ``module.to(dtype)`` would.
            wanted = {name: buffer.dtype for name, buffer in buffers.items()}
            buffers = {name: buffer.to(wanted[name]) for name, buffer in _own_buffers(twin).items()}
        architecture = PlainArchitecture(model, config, buffers, options.settled_dtype)
        return Skeleton(model=model, architecture=architecture, built_by="model=")

    @hookimpl
    def postprocess_model(self, model: torch.nn.Module) -> None:
        """Eval mode: dropout off, as a model that was loaded for use should be."""
        model.eval()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Modules that don't choose a dtype get the load's."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _call_factory(factory: Callable[..., torch.nn.Module], config: ModelConfig) -> torch.nn.Module:
    import inspect

    positional = [
        parameter
        for parameter in inspect.signature(factory).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    takes_config = bool(positional) and (
        positional[0].default is inspect.Parameter.empty or positional[0].name == "config"
    )
    model = factory(dict(config.data)) if takes_config else factory()
    if not isinstance(model, torch.nn.Module):
        raise ConfigError(f"model= returned {type(model).__name__}, expected a torch.nn.Module")
    return model


def _own_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The non-persistent buffers, by name."""
    found = dict(model.named_buffers())
    persistent = set(model.state_dict()) if found else set()
    return {name: buffer for name, buffer in found.items() if name not in persistent}


class PlainArchitecture(Architecture):
    """The user's own module: names as they are; modules that share a parameter are tied."""

    def __init__(
        self, model: torch.nn.Module, config: ModelConfig, buffers: Mapping[str, torch.Tensor], dtype: torch.dtype
    ) -> None:
        self._model = model
        self._dtype = dtype
        self._buffers = buffers
        self._config = config
        self._tied = _shared_names(model)

    def tied(self) -> Mapping[str, str]:
        return self._tied

    def kept(self) -> Mapping[str, str]:
        names = self._tied.keys() | set(self._tied.values())
        return dict.fromkeys(names, "tied")

    def finish(self, outcome: LoadOutcome) -> None:
        for name, buffer in self._buffers.items():
            path, _, leaf = name.rpartition(".")
            self._model.get_submodule(path)._buffers[leaf] = buffer.to(device_of(outcome.devices, name))
        for name, source in outcome.tied.items():
            path, _, leaf = name.rpartition(".")
            owner, _, owner_leaf = source.rpartition(".")
            setattr(self._model.get_submodule(path), leaf, getattr(self._model.get_submodule(owner), owner_leaf))
        missing = set(outcome.missing)
        left = [name for name in outcome.missing if not self._reset_module(name, missing)]
        super().finish(dataclasses.replace(outcome, missing=left, tied={}))

    def _reset_module(self, name: str, missing: set[str]) -> bool:
        path = name.rpartition(".")[0]
        module = self._model.get_submodule(path)
        own = {f"{path}.{leaf}" if path else leaf for leaf, _ in module.named_parameters(recurse=False)}
        reset = getattr(module, "reset_parameters", None)
        if not callable(reset) or not own <= missing:
            return False
        if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            module.to_empty(device="cpu", recurse=False)  # the modules' own rule, in the modules' own words
            reset()
        return True

    def export(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Each tied tensor once, under the name that the others are tied to."""
        return {
            name: tensor
            for name, tensor in state.items()
            if name not in self._tied or tensor.data_ptr() != state[self._tied[name]].data_ptr()
        }

    def write_config(self, folder: Path, quantization: Mapping[str, Any] | None) -> None:
        data = {key: value for key, value in self._config.data.items() if key != "quantization_config"}
        if quantization is not None:
            data["quantization_config"] = dict(quantization)
        if quantization is not None or self._config.dtype is not None:
            # Of a quantized model, tensors don't tell: the first one may be a scale in float32.
            data.pop("torch_dtype", None)
            data["dtype"] = str(self._dtype_now()).removeprefix("torch.")
        (folder / CONFIG_NAME).write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def _dtype_now(self) -> torch.dtype:
        """What the model was loaded in, unless it has been converted since."""
        found = [each.dtype for each in self._model.parameters() if each.is_floating_point() and each.itemsize >= 2]
        return self._dtype if not found or self._dtype in found else found[0]


def _shared_names(model: torch.nn.Module) -> dict[str, str]:
    first: dict[int, str] = {}
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            tied[name] = first[id(parameter)]
        else:
            first[id(parameter)] = name
    return tied
