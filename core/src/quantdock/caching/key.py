"""Which load an entry answers: everything that decides what a load makes, and nothing else, as one digest.

An entry holds what the engine made: the components of quantized parameters, and parameters that were cast, stacked or
otherwise converted. So the key has to cover whatever the engine's result depends on:

- **The weights**: name, size, times and inode of every weight file (see ``stamps``). Not the path: a folder that was
  renamed is still the same. A copy misses, as does a file that was touched; both cost one load. For a repository on
  the Hub these are the stamps of the files in the local cache, which the revision leads to: one digest of the Hub's
  would say no more, and nothing about a local file that was damaged since.
- **What was asked for**, as far as it changes the result: see ``OPTIONS``, in which every option of a load has to have
  its place (a test holds us to it).
- **What was decided**: of every unit the stored tensors (name, file, place, dtype, shape), how they are put together,
  the parameters they become, whose they are and what they are stored as. That follows from the rest; it is in the key
  so that a plugin that decides by something else misses, too.
- **The quantization configs**: every field but those that a config declares to matter at run time only.
- **The code**: versions of core, of every stage plugin that takes part, of the quantizers, and of the libraries that
  these require; for core and plugins the stamps of their source files as well, as the version of an editable
  installation says nothing. What was changed or installed after the process began isn't what runs: no key then.
- **The kind of device** that parameters are quantized on: a GPU's kernels may round differently.

Which devices the model goes to, the memory budget, the number of workers, progress, tokens and cache folders are not in
the key: none of them changes a bit of the result.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import importlib_metadata
import torch

from quantdock.caching.stamps import Stamp, stamp, tree
from quantdock.caching.store import FORMAT
from quantdock.conversion import Conversion
from quantdock.discovery import Offer
from quantdock.registry import Selection
from quantdock.tensors import TensorSpec
from quantdock.units import Unit

if TYPE_CHECKING:
    from quantdock.planning import Plan

KEYED = "keyed"
OPTIONS: Mapping[str, str] = {
    **dict.fromkeys(
        (
            *("dtype", "variant", "use_safetensors", "attn_implementation", "task", "skip", "allow_missing"),
            *("ignore_unexpected", "ignore_mismatched_sizes", "extras"),
        ),
        KEYED,
    ),
    **dict.fromkeys(("quantize",), "as the rules and configs that were selected"),
    **dict.fromkeys(("config", "config_overrides"), "as the resolved config"),
    **dict.fromkeys(("revision",), "leads to files, whose stamps are in the key"),
    **dict.fromkeys(("cache_dir", "token", "local_files_only", "force_download"), "how files are fetched"),
    **dict.fromkeys(("device_map", "max_memory", "offload_dir"), "where the result goes"),
    **dict.fromkeys(("memory_budget", "workers", "progress", "cache"), "how the work is done"),
    **dict.fromkeys(("policy",), "as the plugins that it lets take part"),
    **dict.fromkeys(("model", "plugins", "trust_remote_code"), "code without an identity: such a load isn't cached"),
}
"""Option of a load -> where it is in the key, or why it isn't."""

_CORE = "quantdock"
_BESIDE_CORE = ("torch", "quantdock-kernels")
_KERNELS = "quantdock_kernels"
_BEGAN = time.time_ns()  # this module comes with the first load, before any plugin
_SOURCES = (".py", ".so", ".pyd", ".json")


class UnkeyableError(Exception):
    """Something that decides the result has no form that could be compared; the message names it."""


def key_of(plan: Plan, stamps: Sequence[Stamp]) -> str:
    """The key of a load, 64 hexadecimal digits.

    Args:
        plan: the load.
        stamps: of ``plan.checkpoint.files``, in their order.

    Raises:
        UnkeyableError: something that decides the result can't be written down.
        OSError: source files of a plugin can't be looked at.
    """
    digest = hashlib.sha256()
    for line in _lines(plan, stamps):
        digest.update(json.dumps(line, sort_keys=True, separators=(",", ":")).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def _lines(plan: Plan, stamps: Sequence[Stamp]) -> Iterator[list[Any]]:
    files = plan.checkpoint.files
    yield ["format", FORMAT]
    yield ["files", [[path.name, *found] for path, found in zip(files, stamps, strict=True)]]
    yield ["checkpoint", plan.checkpoint.format, dict(plan.checkpoint.metadata)]
    yield ["config", _written(plan.config.data, "the config"), _native(plan)]
    for name in sorted(name for name, place in OPTIONS.items() if place == KEYED):
        yield ["option", name, _written(getattr(plan.options, name), f"{name}=")]
    yield ["model", f"{type(plan.skeleton.model).__module__}.{type(plan.skeleton.model).__qualname__}"]
    yield ["default dtype", str(torch.get_default_dtype())]
    yield from (["rule", *rule] for rule in _rules(plan.selection))
    yield ["versions", versions(plan)]
    yield ["code", {name: _code(name) for name in sorted(_modules(plan))}]
    yield ["broken", sorted(plan.catalog.broken)]
    order = {file: index for index, file in enumerate(files)}
    numbers = {id(chosen): index for index, chosen in enumerate(plan.selection)}
    yield from (["unit", *_unit(unit, order, numbers)] for unit in plan.units)


def _native(plan: Plan) -> Any:
    native = plan.config.native
    return None if native is None else [type(native).__qualname__, _written(native.to_dict(), "the config object")]


def _rules(selection: Selection) -> Iterator[list[Any]]:
    for rule in selection.rules:
        if rule.chosen is None:
            yield [rule.pattern, None]
            continue
        config = rule.chosen.quantizer.config
        stored = {
            item.name: _written(getattr(config, item.name), f"{type(config).__name__}.{item.name}")
            for item in dataclasses.fields(config)
            if item.name not in config.runtime_fields()
        }
        yield [rule.pattern, rule.chosen.offer.dist, rule.chosen.offer.value, type(config).__qualname__, stored]


def _unit(unit: Unit, order: Mapping[Path, int], numbers: Mapping[int, int]) -> list[Any]:
    sources = [
        [one.name, order[one.file], one.offset, one.stored_nbytes, _spec(one.spec), type(one.reader).__qualname__]
        for one in unit.sources
    ]
    targets = []
    for target in unit.targets:
        chosen, layout = target.decision.chosen, target.decision.layout
        entry: list[Any] = [target.parameter.name, _spec(target.parameter.spec), target.parameter.role]
        if chosen is not None and layout is not None:
            stored = {name: _spec(spec) for name, spec in layout.components.items()}
            entry += [numbers[id(chosen)], stored, _kind(target.device)]
        targets.append(entry)
    return [sources, targets, list(unit.components), _conversion(unit.conversion)]


def _conversion(conversion: Conversion | None) -> Any:
    return None if conversion is None else [conversion.label, repr(conversion.assemblies)]


def _spec(spec: TensorSpec) -> list[Any]:
    return [str(spec.dtype), list(spec.shape)]


def _kind(device: torch.device | str) -> str:
    """What quantizes: the type of a device, and for a GPU its model."""
    if isinstance(device, str):
        return device
    return f"cuda {torch.cuda.get_device_name(device)}" if device.type == "cuda" else device.type


def _written(value: Any, what: str) -> Any:
    """``value`` as JSON-ready data that differs whenever the value does.

    Raises:
        UnkeyableError: it holds an object of another kind.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.dtype):
        return ["dtype", str(value)]
    if isinstance(value, os.PathLike):
        return ["path", os.fspath(value)]
    if isinstance(value, Mapping):
        return ["mapping", [[_written(key, what), _written(item, what)] for key, item in value.items()]]
    if isinstance(value, list | tuple):
        return ["list", [_written(item, what) for item in value]]
    if isinstance(value, set | frozenset):
        return ["set", sorted(json.dumps(_written(item, what)) for item in value)]
    raise UnkeyableError(
        f"{what} holds an object of the class {type(value).__name__}, which can't be compared with that of another load"
    )


# The code -------------------------------------------------------------------------------------------------------------


def _offers(plan: Plan) -> list[Offer]:
    """Of everything that takes part in a load: its quantizers, and every stage plugin."""
    return [*plan.catalog.stages(), *(chosen.offer for chosen in plan.selection)]


def versions(plan: Plan) -> dict[str, str]:
    """Distribution -> version, of all whose code may decide a bit of the result."""
    plugins = {offer.dist for offer in _offers(plan)}
    names = {_CORE, *_BESIDE_CORE, *plugins}
    for plugin in plugins:
        names |= _required(plugin)
    found = {name: version for name in sorted(names) if (version := _version(name)) is not None}
    return found | {"torch": torch.__version__}


@functools.lru_cache(maxsize=64)
def _required(dist: str) -> frozenset[str]:
    from packaging.requirements import Requirement

    try:
        lines: Iterable[str] = importlib_metadata.requires(dist) or ()
    except importlib_metadata.PackageNotFoundError:
        return frozenset()
    return frozenset(Requirement(line).name for line in lines)


@functools.lru_cache(maxsize=256)
def _version(dist: str) -> str | None:
    """The installed version, if that is what this process runs.

    Raises:
        UnkeyableError: it was installed after the process had begun.
    """
    try:
        found = importlib_metadata.distribution(dist)
    except importlib_metadata.PackageNotFoundError:
        return None
    folder = getattr(found, "_path", None)
    if folder is not None:
        _check_unchanged(dist, os.stat(folder).st_ctime_ns)
    return str(found.version)


def _check_unchanged(what: str, changed: int) -> None:
    """What runs is what was imported; an entry mustn't pass for the work of code that was put in its place since."""
    if changed > _BEGAN:
        raise UnkeyableError(f"{what} was changed or installed after this process began; start a new one")


def _modules(plan: Plan) -> set[str]:
    beside = {_KERNELS} if importlib.util.find_spec(_KERNELS) is not None else set()
    return beside | {_CORE, *(offer.value.partition(":")[0].partition(".")[0] for offer in _offers(plan))}


def _code(module: str) -> list[Any]:
    """Names, sizes and times of the source files of a top-level module.

    Raises:
        UnkeyableError: it has none, or they are newer than the process.
        OSError: they can't be looked at.
    """
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError) as error:
        raise UnkeyableError(f"the source files of {module} can't be found ({error})") from error
    if spec is not None and spec.submodule_search_locations:
        trees = [tree(Path(folder), _SOURCES) for folder in spec.submodule_search_locations]
        _check_unchanged(module, max(latest for _, latest in trees))
        return [files for files, _ in trees]
    if spec is None or spec.origin is None:
        raise UnkeyableError(f"{module} has no source files")
    size, written, changed, _ = stamp(Path(spec.origin))
    _check_unchanged(module, changed)
    return [size, written]
