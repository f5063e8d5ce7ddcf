"""The result cache in a load: look it up when the plan stands, keep what the engine made.

An entry takes the place of units, not of a source: the plan is drawn up from the source as ever (its headers, its
config, the ledger, who quantizes what), and where an entry answers it, the units that quantize, cast or convert are
exchanged for units that map the entry. Everything before and after the engine is the same as without a cache, so a
model that came from it has the same ledger, quantizers, config and attributes, and is saved as the same files.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from quantdock.caching.key import UnkeyableError, key_of, versions
from quantdock.caching.stamps import Stamp, settled_stamps, stamp
from quantdock.caching.store import Entry, Store, claimed, default_folder, logger
from quantdock.checkpoint import Checkpoint
from quantdock.conversion import Conversion, rename
from quantdock.errors import ConfigError, QuantdockError, SaveError
from quantdock.find_checkpoint import find_checkpoint
from quantdock.matching import Match
from quantdock.options import parse_bytes
from quantdock.saving import aside, write_weights
from quantdock.source import FolderSource
from quantdock.tensors import StoredTensor, TensorSpec
from quantdock.units import Target, Unit, make_units

if TYPE_CHECKING:
    from quantdock.planning import Plan

ENVIRONMENT = "QUANTDOCK_CACHE"
SIZE = "QUANTDOCK_CACHE_SIZE"
DEFAULT_SIZE = "50GB"
SHARD = 256 << 20
"""Bytes of one file of an entry. What is on a device comes to the host a file at a time while it is written."""

_SWITCH = {"": False, "0": False, "false": False, "no": False, "off": False} | dict.fromkeys(
    ("1", "true", "yes", "on"), True
)
State = Literal["off", "unused", "hit", "miss", "made", "failed"]


@dataclass(kw_only=True)
class Cached:
    """What the result cache does for one load, and what became of it."""

    state: State = "off"
    """``off``: nobody asked; ``unused``: there is nothing to keep, or it can't be; ``hit``: an entry is used; ``miss``:
    one is to be made; ``made``: it was; ``failed``: it couldn't be, and the load isn't the worse for it."""
    reason: str = ""
    store: Store | None = None
    key: str = ""
    stamps: list[Stamp] = field(default_factory=list)
    from_entry: list[Unit] | None = None
    entry: Entry | None = None

    def units(self, planned: list[Unit]) -> list[Unit]:
        """The units to run: those of the plan, or those that take the entry instead."""
        return planned if self.from_entry is None else self.from_entry

    def settle(self, plan: Plan) -> None:
        """The engine is through, and nobody else has touched the model: note the use of the entry, or make it."""
        if self.state == "hit":
            assert self.store is not None
            assert self.entry is not None
            self.store.touch(self.entry)
        elif self.state == "miss":
            try:
                self._make(plan)
            except (QuantdockError, OSError) as error:
                self._fail(str(error))
            except Exception as error:  # noqa: BLE001 - a plugin's components(); the model is loaded all the same
                self._fail(f"{type(error).__name__}: {error}")

    @property
    def facts(self) -> dict[str, str]:
        """For the report: ``state``, the ``entry`` if there is one, and the ``reason`` for what isn't plain success."""
        found = {"state": self.state, "entry": self.key if self.state in ("hit", "made") else "", "reason": self.reason}
        return {name: value for name, value in found.items() if value}

    def _fail(self, reason: str) -> None:
        self.state, self.reason = "failed", reason
        logger.warning("result cache: nothing was kept: %s", reason)

    @torch.no_grad()
    def _make(self, plan: Plan) -> None:
        assert self.store is not None
        limit = size_limit()
        state = _made_by_engine(plan)
        needed = sum(tensor.nbytes for tensor in state.values())
        if needed > limit:
            self.state, self.reason = "unused", f"it takes {needed:,} bytes, {SIZE} allows {limit:,}"
            return
        self.store.make_folder()
        self.store.sweep()
        self.store.make_room(needed, limit)
        folder = self.store.folder / self.key
        try:
            if not folder.exists():
                self._write(state, folder, plan)
        except SaveError:
            if not folder.exists():
                raise
        self.state = "made"

    def _write(self, state: Mapping[str, torch.Tensor], folder: Path, plan: Plan) -> None:
        assert self.store is not None
        with ExitStack() as claims, aside(folder) as staging:
            claims.enter_context(claimed(staging))  # given up after the folder has its name
            write_weights(state, staging, SHARD)
            self._check_source(plan)
            self.store.seal(staging, _facts(plan))

    def _check_source(self, plan: Plan) -> None:
        files = plan.checkpoint.files
        changed = [path.name for path, before in zip(files, self.stamps, strict=True) if stamp(path) != before]
        if changed:
            raise SaveError(f"{', '.join(changed)} of the source changed during the load")


def consult(plan: Plan) -> Cached:
    """What the result cache can do for a load; its units are exchanged if there is an entry."""
    if not is_on(plan.options.cache):
        return Cached()
    size_limit()  # a wrong value is an error of every load, not only of those that make an entry
    reason = _why_not(plan)
    if reason is not None:
        return Cached(state="unused", reason=reason)
    try:
        stamps = settled_stamps(plan.checkpoint.files)
        key = key_of(plan, stamps)
    except (UnkeyableError, OSError) as error:
        return Cached(state="unused", reason=str(error))
    found = Cached(state="miss", store=Store(default_folder()), key=key, stamps=stamps)
    _look_up(found, plan)
    return found


def is_on(asked: bool | None) -> bool:
    """Whether results are kept: as ``cache=`` says, or the environment.

    Raises:
        ConfigError: the environment says neither 1 nor 0.
    """
    if asked is not None:
        return asked
    value = os.environ.get(ENVIRONMENT, "")
    if value.lower() not in _SWITCH:
        raise ConfigError(f"{ENVIRONMENT}={value!r}: expected 1 or 0")
    return _SWITCH[value.lower()]


def size_limit() -> int:
    """``QUANTDOCK_CACHE_SIZE`` in bytes.

    Raises:
        ConfigError: it isn't a size.
    """
    return parse_bytes(os.environ.get(SIZE) or DEFAULT_SIZE, option=SIZE)


def _why_not(plan: Plan) -> str | None:
    """Why this load has nothing to keep, or can't be recognised when it comes again."""
    options = plan.options
    if plan.selection.prequantized:
        return "the checkpoint is quantized already"
    if not any(target.action == "quantize" for unit in plan.units for target in unit.targets):
        return "nothing is quantized in this load"
    if options.model is not None:
        return "model= is code without an identity"
    if options.plugins:
        return "plugins= are objects without an identity"
    if options.trust_remote_code:
        return "trust_remote_code=True runs code without an identity"
    if plan.calibrating is not None:
        return "calibration looks at data that isn't in the key, and may change more than it quantizes; save the model"
    if plan.placement.offloads:
        return "a part of the model goes to disk"
    unsaved = [chosen.label for chosen in plan.selection if not chosen.quantizer.capabilities.save]
    return f"{', '.join(unsaved)} can't be saved" if unsaved else None


# What an entry holds --------------------------------------------------------------------------------------------------


def _is_work(unit: Unit) -> bool:
    """Whether a unit's result is worth keeping: whatever isn't a view of the source's own files.

    Decided by the source alone, so that an entry fits whatever device a later load places it on.
    """
    if unit.conversion is None or not unit.conversion.is_rename:
        return True
    (source,), (target,) = unit.sources, unit.targets
    return target.decision.chosen is not None or not source.reader.maps or source.spec != target.parameter.spec


def _targets(units: list[Unit]) -> Iterator[Target]:
    return (target for unit in units if _is_work(unit) for target in unit.targets)


def _component(parameter: str, component: str) -> str:
    """The name of a quantized parameter's component in an entry; the rest go by the parameter's name."""
    return f"{parameter}:{component}"


def _made_by_engine(plan: Plan) -> dict[str, torch.Tensor]:
    """The tensors of an entry, out of the model; they are the model's own, not copies."""
    model = plan.skeleton.model
    state: dict[str, torch.Tensor] = {}
    for target in _targets(plan.units):
        parameter, chosen = target.parameter, target.decision.chosen
        if chosen is None:
            module = parameter.owner(model)
            found = {parameter.name: getattr(module, parameter.leaf)}
        else:
            parts = chosen.quantizer.components(model, parameter)
            assert target.decision.layout is not None
            if not target.decision.layout.fits({name: TensorSpec.of(part) for name, part in parts.items()}):
                raise SaveError(f"{chosen.label} gives other components for {parameter.name!r} than it declared")
            found = {_component(parameter.name, name): part for name, part in parts.items()}
        if found.keys() & state.keys():
            raise SaveError(f"{parameter.name!r} has a name that an entry can't tell from another")
        state |= found
    return state


def _facts(plan: Plan) -> dict[str, Any]:
    """For people who look into the manifest."""
    labels = {rule.pattern: None if rule.chosen is None else rule.chosen.label for rule in plan.selection.rules}
    return {
        "source": dict(plan.source.identity),
        "quantize": labels.get("*") if labels.keys() == {"*"} else labels,
        "dtype": str(plan.options.dtype).removeprefix("torch."),
        "task": plan.options.task,
        "versions": versions(plan),
    }


# From an entry to units -----------------------------------------------------------------------------------------------


def _look_up(found: Cached, plan: Plan) -> None:
    assert found.store is not None
    try:
        entry = found.store.find(found.key)
        if entry is None:
            return
        checkpoint = find_checkpoint(FolderSource(str(entry.folder), entry.folder), variant=None, use_safetensors=True)
        match = _answered(plan, checkpoint)
        if match is None:
            found.store.discard(entry.folder, "its tensors aren't those of the plan")
            return
        # Mapped now, an entry may go away before the plan is executed.
        for tensor in {tensor.file: tensor for tensor in checkpoint.tensors.values() if tensor.stored_nbytes}.values():
            tensor.read()
    except (OSError, QuantdockError) as error:
        logger.info("result cache: %s can't be used: %s", found.key, error)
        return
    kept = [unit for unit in plan.units if not _is_work(unit)]
    found.state, found.entry = "hit", entry
    found.from_entry = kept + make_units(match, checkpoint, plan.placement)


def _answered(plan: Plan, entry: Checkpoint) -> Match | None:
    """The plan's match with the entry's tensors in place of the source's; ``None`` if they aren't the ones it needs."""
    left = dict(entry.tensors)
    conversions: list[Conversion] = []
    components: dict[str, Mapping[str, StoredTensor]] = {}
    for target in _targets(plan.units):
        parameter, layout = target.parameter, target.decision.layout
        if layout is None:
            tensor = left.pop(parameter.name, None)
            if tensor is None or tensor.spec != parameter.spec:
                return None
            conversions.append(rename(parameter.name, parameter.name, parameter.spec))
            continue
        parts = {name: left.pop(_component(parameter.name, name), None) for name in layout.components}
        whole = {name: part for name, part in parts.items() if part is not None}
        if len(whole) < len(parts) or not layout.fits({name: part.spec for name, part in whole.items()}):
            return None
        components[parameter.name] = whole
    if left:
        return None
    return dataclasses.replace(
        plan.match, conversions=conversions, components={name: dict(parts) for name, parts in components.items()}
    )
