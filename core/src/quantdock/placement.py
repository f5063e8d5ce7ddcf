"""Which device each parameter goes to. accelerate decides; the bytes it decides on are the plan's exact ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from quantdock.errors import PlacementError
from quantdock.options import LoadOptions, parse_bytes
from quantdock.tensors import qualified

DISK = "disk"
_STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where everything goes."""

    device_map: Mapping[str, torch.device | str]
    """Module (or parameter) path -> device or ``"disk"``; ``{"": device}`` when there is only one."""

    @property
    def single(self) -> torch.device | None:
        """The one device of the model, unless there are several or some of it is on disk."""
        devices = set(map(str, self.device_map.values()))
        if len(devices) != 1 or DISK in devices:
            return None
        return torch.device(devices.pop())

    @property
    def offloads(self) -> bool:
        """Whether some of the model is on disk."""
        return DISK in map(str, self.device_map.values())

    def device_of(self, name: str) -> torch.device | str:
        """The device of a parameter: that of the longest path in the map that contains it.

        Raises:
            PlacementError: the map doesn't cover it.
        """
        if len(self.device_map) == 1 and "" in self.device_map:
            return self.device_map[""]
        return device_of(self.device_map, name)


def device_of(device_map: Mapping[str, torch.device | str], name: str) -> torch.device | str:
    """The device that a map gives to ``name``; see ``Placement.device_of``."""
    path = name
    while True:
        if path in device_map:
            return device_map[path]
        if not path:
            raise PlacementError(
                f"device_map doesn't say where {name!r} goes. It names {', '.join(map(repr, device_map))}; "
                'add the missing modules, or "" for everything else'
            )
        path = path.rpartition(".")[0]


def place(
    model: torch.nn.Module,
    sizes: Mapping[str, int],
    tied: Mapping[str, str],
    no_split: Sequence[str],
    options: LoadOptions,
    preferred: torch.device | None,
) -> Placement:
    """Decide the devices.

    Args:
        model: the skeleton.
        sizes: exact bytes of each parameter and buffer in the loaded model, 0 for tied ones.
        tied: parameter -> the one whose tensor it shares.
        no_split: class names of modules that stay on one device.
        options: ``device_map`` and ``max_memory``.
        preferred: where a quantizer wants the model when the user names no device.

    Raises:
        PlacementError: the map names what isn't in the model, or devices that don't exist.
    """
    asked = options.device_map
    if asked is None:
        return Placement(device_map={"": preferred or torch.device("cpu")})
    if isinstance(asked, str) and asked in _STRATEGIES:
        return _inferred(model, sizes, tied, no_split, asked, options.max_memory)
    if isinstance(asked, Mapping):
        return _explicit(model, asked)
    return Placement(device_map={"": _device(asked)})


def _device(value: Any) -> torch.device | str:
    if value == DISK:
        return DISK
    try:
        device = torch.device(value)
    except (RuntimeError, TypeError) as error:
        raise PlacementError(
            f"device_map={value!r}: neither a device nor one of {', '.join(_STRATEGIES)} ({str(error).splitlines()[0]})"
        ) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise PlacementError(f"device_map names {device}, but this machine has no CUDA device (or torch no CUDA build)")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise PlacementError(f"device_map names {device}, but there are {torch.cuda.device_count()} CUDA devices")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def _explicit(model: torch.nn.Module, asked: Mapping[str, Any]) -> Placement:
    known = {name for name, _ in model.named_modules(remove_duplicate=False)} | set(model.state_dict())
    strangers = [name for name in asked if name not in known]
    if strangers:
        raise PlacementError(
            f"device_map names {', '.join(map(repr, strangers))}, which the model doesn't have; its top modules are "
            f"{', '.join(name for name, _ in model.named_children())}"
        )
    return Placement(device_map={name: _device(value) for name, value in asked.items()})


def _inferred(
    model: torch.nn.Module,
    sizes: Mapping[str, int],
    tied: Mapping[str, str],
    no_split: Sequence[str],
    strategy: str,
    max_memory: Mapping[Any, int | str] | None,
) -> Placement:
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory, get_max_memory

    shadow = _shadow(model, sizes, tied)
    limits = get_max_memory(
        None
        if max_memory is None
        else {key: parse_bytes(value, option=f"max_memory[{key!r}]") for key, value in max_memory.items()}
    )
    total = sum(sizes.values())
    first = next(iter(limits))
    if strategy in ("auto", "sequential") and total <= limits[first]:
        return Placement(device_map={"": _device(first)})  # it fits by arithmetic, so it fits
    if strategy != "sequential":
        limits = get_balanced_memory(
            shadow, max_memory=limits, no_split_module_classes=list(no_split), low_zero=strategy == "balanced_low_0"
        )
    inferred = infer_auto_device_map(shadow, max_memory=dict(limits), no_split_module_classes=list(no_split))
    if DISK in inferred.values() or "cpu" in inferred.values():
        inferred = _without_reserve(shadow, dict(limits), list(no_split)) or inferred
    return Placement(device_map={name: _device(device) for name, device in inferred.items()})


def _without_reserve(shadow: torch.nn.Module, limits: dict[Any, int], no_split: list[str]) -> dict[str, Any] | None:
    """A map that needs no offloading, if there is one.

    accelerate keeps room for the largest layer on the first device, for layers that are offloaded and come back. When
    the model fits without offloading, that room isn't needed.
    """
    from accelerate import infer_auto_device_map

    fast = {device: limit for device, limit in limits.items() if device not in ("cpu", DISK)} or limits
    first = next(iter(fast))
    largest = max(
        (
            sum(p.numel() for p in module.parameters())
            for module in shadow.modules()
            if type(module).__name__ in no_split
        ),
        default=0,
    ) or max((sum(p.numel() for p in module.parameters(recurse=False)) for module in shadow.modules()), default=0)
    roomy = fast | {first: fast[first] + largest}
    found = infer_auto_device_map(shadow, max_memory=roomy, no_split_module_classes=no_split)
    used: dict[Any, int] = {}
    for name, parameter in shadow.named_parameters():
        device = Placement(device_map=found).device_of(name)
        used[device] = used.get(device, 0) + parameter.numel()
    fits = all(device in fast and amount <= fast[device] for device, amount in used.items())
    return dict(found) if fits else None


def _shadow(model: torch.nn.Module, sizes: Mapping[str, int], tied: Mapping[str, str]) -> torch.nn.Module:
    """A tree of the same names and class names whose parameters are byte tensors of the exact sizes, on meta.

    accelerate computes with element counts and dtypes; this is how it gets to compute with bytes of any format.
    """
    made: dict[str, torch.nn.Parameter] = {}
    # By module, from the sizes and not from the modules: a swapped module may know its parameter under other names.
    leaves: dict[str, list[str]] = defaultdict(list)
    for name in sizes:
        leaves[name.rpartition(".")[0]].append(name)

    def build(source: torch.nn.Module, path: str) -> torch.nn.Module:
        copy: torch.nn.Module = type(type(source).__name__, (torch.nn.Module,), {})()
        for name in leaves[path]:
            owner = tied.get(name, name)
            if owner not in made:
                size = torch.empty(sizes[owner], dtype=torch.uint8, device="meta")
                made[owner] = torch.nn.Parameter(size, requires_grad=False)
            copy.register_parameter(name.rpartition(".")[2], made[owner])
        for leaf, child in source.named_children():
            copy.add_module(leaf, build(child, qualified(path, leaf)))
        return copy

    return build(model, "")
