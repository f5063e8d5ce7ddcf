"""A load up to its plan, stage by stage. Each step is one line here and one module of the same name elsewhere."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from quantdock.architecture import Skeleton
from quantdock.caching.results import consult, is_on
from quantdock.calibration.preparing import check_placement, prepare
from quantdock.checkpoint import Checkpoint
from quantdock.config import ModelConfig
from quantdock.discovery import Catalog, installed
from quantdock.errors import ConfigError, PolicyError
from quantdock.matching import match
from quantdock.options import LoadOptions, parse_dtype
from quantdock.planning import Plan
from quantdock.policy import Policy
from quantdock.populating import populate_in_background
from quantdock.preparing import assign, preprocess, resolve_placement
from quantdock.registry import select
from quantdock.source import open_source
from quantdock.stages import add_quantizers, stage_manager, watched
from quantdock.stopwatch import Stopwatch
from quantdock.units import make_units


def make_plan(
    named: str | os.PathLike[str],
    arguments: Mapping[str, Any],
    announce: Callable[[str], object] | None = None,
    *,
    at_once: bool = False,
) -> Plan:
    """Decide everything about a load.

    Args:
        named: what the user named.
        arguments: of ``load``, by name.
        announce: told the name of each stage as it begins.
        at_once: the plan is going to be executed, so what is mapped may be touched while the rest is decided.
    """
    options = LoadOptions(**{**arguments, "extras": arguments.get("extras") or {}})
    clock = Stopwatch(announce)
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
    with clock.stage("prepare calibration"):
        calibrating = prepare(skeleton, matched, selection, source)
    with clock.stage("place"):
        placement = resolve_placement(skeleton, matched, selection, options)
        check_placement(calibrating, placement)
        units = make_units(matched, checkpoint, placement, whole=watched(hooks, selection))
        populating = at_once and calibrating is None and not is_on(options.cache)
        if populating:
            populate_in_background(units)
    with clock.stage("preprocess_model"):
        preprocess(skeleton, matched, hooks)
    made = Plan(
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
        calibrating=calibrating,
        populating=populating,
    )
    with clock.stage("cache"):
        made.cached = consult(made)
    return made


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
