"""A load, stage by stage. Each step is one line here and one module of the same name elsewhere."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import torch

from quantdock.architecture import Skeleton
from quantdock.checkpoint import Checkpoint
from quantdock.config import ModelConfig
from quantdock.discovery import Catalog, installed
from quantdock.errors import ConfigError, PolicyError
from quantdock.matching import match
from quantdock.options import LoadOptions, parse_dtype
from quantdock.planning import Plan
from quantdock.policy import Policy
from quantdock.preparing import assign, preprocess, resolve_placement
from quantdock.registry import select
from quantdock.source import open_source
from quantdock.stages import add_quantizers, stage_manager, watched
from quantdock.stopwatch import Stopwatch
from quantdock.units import make_units

P = ParamSpec("P")
R = TypeVar("R")


def load(
    source: str | os.PathLike[str],
    *,
    quantize: Any = None,
    dtype: torch.dtype | str = "auto",
    device_map: str | int | torch.device | Mapping[str, Any] | None = None,
    max_memory: Mapping[Any, int | str] | None = None,
    offload_dir: str | os.PathLike[str] | None = None,
    memory_budget: int | str = "256MiB",
    workers: int | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    variant: str | None = None,
    use_safetensors: bool = True,
    config: Any = None,
    config_overrides: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    model: Callable[..., torch.nn.Module] | None = None,
    task: str = "causal-lm",
    skip: Sequence[str] = (),
    allow_missing: Sequence[str] = (),
    ignore_unexpected: Sequence[str] = (),
    ignore_mismatched_sizes: bool = False,
    policy: str | os.PathLike[str] | None = None,
    plugins: Sequence[object] = (),
    progress: bool | Callable[..., object] | None = None,
    extras: Mapping[str, Any] | None = None,
) -> torch.nn.Module:
    """Load a pretrained checkpoint, quantized on the way if asked to, and return the model in eval mode.

    Patterns are shell-style on dotted names; one matches a parameter or a module that contains it.

    Args:
        source: a folder, a weight file, or a repository on the Hub (``ORG/NAME``).
        quantize: a preset's name, a config object, a transformers quantization config, an object as in
            ``config.json``, or an ordered mapping of patterns to any of these or ``None`` (the first match decides).
            For a checkpoint that is quantized already: only overrides of run-time attributes.
        dtype: of what stays in full precision; ``"auto"`` follows the config, then the checkpoint.
        device_map: a device, ``"auto"``, ``"balanced"``, ``"balanced_low_0"``, ``"sequential"``, or a mapping of
            module paths to devices (``"cpu"``, ``0``, ``"disk"``). ``None``: the CPU, or what the
            quantizer prefers.
        max_memory: device -> bytes it may be given (``{0: "20GiB", "cpu": "64GiB"}``).
        offload_dir: folder for what ``device_map`` puts on disk.
        memory_budget: bytes that may be in flight beside the model, such as ``"256MiB"``.
        workers: threads that convert and quantize; one per core if not given, at most 8.
        revision, cache_dir, token, local_files_only, force_download: as for the Hub.
        variant: of the weight files, such as ``"fp16"``.
        use_safetensors: ``False`` reads ``pytorch_model.bin`` instead, with pickle restricted to tensors.
        config: use this config (an object, a mapping or a path) instead of the source's.
        config_overrides: merged into the config before the model is built.
        trust_remote_code: run the modelling code that the source ships; off unless asked, and a policy can forbid it.
        attn_implementation: for the architecture, such as ``"sdpa"`` or ``"eager"``.
        model: a factory of your own module instead of an architecture plugin; called with the config if it takes one.
        task: which head: ``"causal-lm"``, ``"base"``, ``"sequence-classification"``, ...
        skip: patterns of parameters that stay in full precision, beside the architecture's own.
        allow_missing: patterns of parameters that may be initialised anew.
        ignore_unexpected: patterns of stored tensors that may be left out.
        ignore_mismatched_sizes: initialise parameters whose stored shape differs.
        policy: a policy file, beside the one that ``QUANTDOCK_POLICY`` names.
        plugins: plugin objects for this load only.
        progress: show a bar (by default on a terminal), or a callable told a ``Progress`` after each unit.
        extras: arguments for a stage plugin, by its own documentation.

    Raises:
        QuantdockError: one of its kinds, each of which says what was found, expected, where, and what to do.
    """
    # The names above are the fields of LoadOptions, one to one.
    options = {name: value for name, value in locals().items() if name not in ("source", "extras")}
    return _plan(source, LoadOptions(**options, extras=extras or {})).execute()


def _same_arguments(_: Callable[P, Any]) -> Callable[[Callable[..., R]], Callable[P, R]]:
    """Give a function the arguments of another, for people and for type checkers."""

    def decorate(function: Callable[..., R]) -> Callable[P, R]:
        signature = inspect.signature(load)

        @functools.wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            bound = signature.bind(*args, **kwargs)
            return function(*bound.args, **bound.kwargs)

        wrapper.__signature__ = signature.replace(return_annotation="Plan")  # type: ignore[attr-defined]
        return wrapper

    return decorate


@_same_arguments(load)
def plan(source: str | os.PathLike[str], **arguments: Any) -> Plan:
    """Decide everything about a load without reading a weight; takes the arguments of ``load``.

    The plan prints as a table, ``to_dict()`` gives it as data, and ``execute()`` loads.
    """
    return _plan(source, LoadOptions(**arguments | {"extras": arguments.get("extras") or {}}))


def _plan(named: str | os.PathLike[str], options: LoadOptions) -> Plan:
    clock = Stopwatch()
    with clock.stage("discover"):
        policy = Policy.in_force(options.policy)
        _check_remote_code(policy, options)
        catalog = Catalog(installed(), policy)
        hooks = stage_manager(catalog, options.plugins)
    with clock.stage("resolve_config"):
        source = open_source(named, options)
        config = hooks.hook.resolve_config(source=source, options=options).overridden(options.config_overrides)
    with clock.stage("find_checkpoints"):
        checkpoint = hooks.hook.find_checkpoints(source=source, config=config, options=options)
    with clock.stage("select quantizers"):
        selection = select(options.quantize, config.quantization, catalog)
        add_quantizers(hooks, selection)
    with clock.stage("build_model"):
        options = dataclasses.replace(options, dtype=_settled_dtype(options, config, checkpoint))
        skeleton = hooks.hook.build_model(source=source, config=config, checkpoint=checkpoint, options=options)
        _check_built(skeleton, config, catalog)
    with clock.stage("match"):
        matched = match(skeleton, checkpoint, selection, options)
        assign(selection, matched)
    with clock.stage("preprocess_model"):
        preprocess(skeleton, matched, hooks)
    with clock.stage("place"):
        placement = resolve_placement(skeleton, matched, selection, options)
        units = make_units(matched, checkpoint, placement, whole=watched(hooks, selection))
    return Plan(
        source=source,
        options=options,
        config=config,
        checkpoint=checkpoint,
        skeleton=skeleton,
        selection=selection,
        match=matched,
        placement=placement,
        units=units,
        hooks=hooks,
        catalog=catalog,
        stopwatch=clock,
    )


def _check_remote_code(policy: Policy, options: LoadOptions) -> None:
    if options.trust_remote_code and not policy.allows_remote_code:
        raise PolicyError(f"trust_remote_code=True is forbidden by {policy.origin}")


def _settled_dtype(options: LoadOptions, config: ModelConfig, checkpoint: Checkpoint) -> torch.dtype:
    """What ``dtype="auto"`` stands for: the config's dtype, else the checkpoint's first floating one."""
    if isinstance(options.dtype, torch.dtype):
        return options.dtype
    if config.dtype is not None:
        return parse_dtype(config.dtype, option=f"{config.origin}: dtype")
    return checkpoint.float_dtype or torch.get_default_dtype()


def _check_built(skeleton: Skeleton | None, config: ModelConfig, catalog: Catalog) -> None:
    if skeleton is None:
        broken = "".join(f" {why}" for why in catalog.broken.values())
        raise ConfigError(
            f"{config.origin}: no installed plugin builds model_type {config.data.get('model_type')!r}. Install one "
            f"(pip install quantdock-transformers), or pass model= with a factory of your own.{broken}"
        )
