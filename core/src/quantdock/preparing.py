"""Between matching and loading: quantizers learn what is theirs, modules are swapped, devices are chosen."""

from __future__ import annotations

import functools

import pluggy
import torch

from quantdock.architecture import Skeleton
from quantdock.errors import PlacementError, PluginError
from quantdock.matching import Match
from quantdock.options import LoadOptions
from quantdock.placement import DISK, Placement, place
from quantdock.registry import Selection
from quantdock.slots import buffers, walk
from quantdock.tensors import qualified


def assign(selection: Selection, match: Match) -> None:
    """Tell each quantizer which parameters are its own."""
    for chosen in selection:
        mine = {name: d for name, d in match.decisions.items() if d.chosen is chosen}
        chosen.quantizer.parameters = {name: match.parameters[name] for name in mine}
        chosen.quantizer.stored = {
            name: match.stored_specs(name) for name in mine if name in match.components or name in match.pieces
        }


def preprocess(skeleton: Skeleton, match: Match, hooks: pluggy.PluginManager) -> None:
    """Run the stage, and hold it to its word: all on meta, and nothing changed but what quantizers own.

    Raises:
        PluginError: a plugin touched a parameter that isn't its own, or put one off the meta device.
    """
    if not hooks.hook.preprocess_model.get_hookimpls():
        return
    model = skeleton.model
    # Some classes create parameters that torch's meta context can't catch; those are the architecture's doing.
    real_before = {
        id(slot)
        for _, module in walk(model)
        for slot in module._parameters.values()
        if slot is not None and not slot.is_meta
    }
    hooks.hook.preprocess_model(model=model)
    modules = dict(walk(model))
    state = functools.cache(functools.partial(model.state_dict, keep_vars=True))
    problems = []
    for name, parameter in match.parameters.items():
        if match.decisions[name].chosen is not None:
            continue
        slot = _slot(modules.get(parameter.module), parameter.leaf)
        if slot is None:  # or under a name that a module's hooks gave it
            slot = state().get(name)
        if slot is None:
            problems.append(f"{name!r} is gone")
        elif tuple(slot.shape) != parameter.spec.shape:
            problems.append(f"{name!r} became {list(slot.shape)}")
    problems += [
        f"{qualified(path, leaf)!r} is on {slot.device}"
        for path, module in modules.items()
        for leaf, slot in module._parameters.items()
        if slot is not None and not slot.is_meta and id(slot) not in real_before
    ]
    if problems:
        raise PluginError(
            "preprocess_model may swap only the modules of the quantizer's own parameters, on the meta device; after "
            "it " + "; ".join(problems[:5])
        )


def _slot(module: torch.nn.Module | None, leaf: str) -> torch.Tensor | None:
    if module is None:
        return None
    parameter = module._parameters.get(leaf)
    return module._buffers.get(leaf) if parameter is None else parameter


def resolve_placement(skeleton: Skeleton, match: Match, selection: Selection, options: LoadOptions) -> Placement:
    """Devices for every parameter, and each quantizer's word that it runs there.

    Raises:
        PlacementError, UnsupportedError: they don't exist, or a method doesn't run on one.
    """
    sizes = {name: resident_nbytes(match, name) for name in match.parameters}
    sizes |= own_buffers(skeleton.model, match)
    preferred = next((d for c in selection if (d := c.quantizer.preferred_device()) is not None), None)
    placement = place(skeleton.model, sizes, match.tied, skeleton.architecture.no_split_modules(), options, preferred)
    for chosen in selection:
        devices = {str(placement.device_of(name)): name for name in chosen.quantizer.parameters}
        for device, name in devices.items():
            if device == DISK:
                raise PlacementError(
                    f"{name!r} is quantized with {chosen.label} and can't be offloaded to disk; name more memory, or "
                    "leave that module unquantized"
                )
            chosen.quantizer.check_device(torch.device(device))
    return placement


def resident_nbytes(match: Match, name: str) -> int:
    """Bytes that one parameter takes in the loaded model; 0 when it shares another's tensor."""
    if name in match.tied:
        return 0
    layout = match.decisions[name].layout
    return match.parameters[name].spec.nbytes if layout is None else layout.nbytes


def own_buffers(model: torch.nn.Module, match: Match) -> dict[str, int]:
    """Buffers that no checkpoint stores, which the model computes for itself: name -> bytes."""
    own = {id(buffer): (name, buffer) for name, buffer in reversed(buffers(model).items())}  # each by its first name
    if not own:
        return {}
    stored = set(match.parameters)  # and the components of quantized ones, where modules have them as buffers
    for name, decision in match.decisions.items():
        if decision.layout is not None:
            path = match.parameters[name].module
            stored.update(qualified(path, component) for component in decision.layout.components)
    return {name: buffer.nbytes for name, buffer in reversed(own.values()) if name not in stored}
