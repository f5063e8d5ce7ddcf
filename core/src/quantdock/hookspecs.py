"""The stages of a load, in the order they are called. Everything a plugin can take part in is on this page.

Every load has a plugin manager of its own. Core's defaults are registered first, so they are asked last; then come the
stage plugins and the quantizers of this load. In a *first result* hook, whoever returns something other than ``None``
first decides, and nobody after it is asked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from quantdock.architecture import Skeleton
    from quantdock.checkpoint import Checkpoint
    from quantdock.config import ModelConfig
    from quantdock.options import LoadOptions
    from quantdock.source import Source
    from quantdock.tensors import Parameter

PROJECT = "quantdock"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec(firstresult=True)
def resolve_config(source: Source, options: LoadOptions) -> ModelConfig | None:
    """Find out what the source says about its model.

    Called first, once per load. Return the config, or ``None`` when this source isn't of a kind you know; core's
    default reads ``config.json``. First result. The source may be asked for files; nothing else may be fetched.

    Args:
        source: where the checkpoint comes from; ``source.find(name)`` gives a local path.
        options: everything the user passed to ``load``.
    """


@hookspec(firstresult=True)
def find_checkpoints(source: Source, config: ModelConfig, options: LoadOptions) -> Checkpoint | None:
    """Index the weight files of the source, from headers only.

    Called once per load, after ``resolve_config``. Return the checkpoint with every stored tensor validated and not
    one value read, or ``None`` when the format isn't yours; core's default finds safetensors files, and pickles when
    they were asked for. First result.

    Args:
        source: where the weight files are.
        config: what ``resolve_config`` returned.
        options: everything the user passed to ``load``.
    """


@hookspec(firstresult=True)
def build_model(source: Source, config: ModelConfig, checkpoint: Checkpoint, options: LoadOptions) -> Skeleton | None:
    """Make the model on the meta device, without a byte of weights.

    Called once per load. Return the skeleton (the module plus what the loader must know of its architecture), or
    ``None`` when the architecture isn't yours; core's default serves ``load(..., model=factory)``. First result.

    Args:
        source: where more of the model's files are (a generation config, for one).
        config: what ``resolve_config`` returned, overrides applied.
        checkpoint: what ``find_checkpoints`` returned; names, dtypes and shapes may be looked at.
        options: everything the user passed to ``load``; ``options.dtype`` is settled by now.
    """


@hookspec
def preprocess_model(model: torch.nn.Module) -> None:
    """Change the skeleton for what is going to be loaded into it, still on the meta device.

    Called once per load on every plugin that implements it; return values are ignored. A quantizer swaps the modules
    that own ``self.parameters`` and touches no other; the model is mutated in place.

    Args:
        model: the skeleton's module, all of it on the meta device.
    """


@hookspec(firstresult=True)
def quantize_param(parameter: Parameter, tensor: torch.Tensor) -> Mapping[str, torch.Tensor] | None:
    """Turn one full-precision tensor into the stored tensors of the quantized parameter.

    Called once for each parameter that the plan gives to a quantizer, on that quantizer, from worker threads and for
    several parameters at once: keep no state. Torch is single-threaded there (see ``quantdock.caller_threads``).
    Return the components by their name inside the owning module, exactly as the quantizer's ``layout`` declared them,
    or ``None`` for a parameter that isn't yours. First result. Don't mutate or keep ``tensor``: it may be a view of the
    mapped file. A large parameter whose layout declares ``slices`` goes to the quantizer's ``quantize_slice`` instead,
    unless a stage plugin implements this hook: then it is called for every parameter.

    Args:
        parameter: which one; its ``spec`` is the full-precision shape and dtype.
        tensor: the values, on the device that the parameter is placed on.
    """


@hookspec
def postprocess_model(model: torch.nn.Module) -> None:
    """Finish the model after every parameter is in place.

    Called once per load on every plugin that implements it, in this order: quantizers, then stages, then core's
    default, which puts the model in eval mode. What is missing has been initialised and tied parameters share their
    tensor by now. Return values are ignored; the model is mutated in place. The ledger is checked after this stage.

    Args:
        model: the loaded model.
    """
