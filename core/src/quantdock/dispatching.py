"""Spread a loaded model: hooks that move activations between devices, and weights in from the disk."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from quantdock.errors import PlacementError
from quantdock.options import LoadOptions
from quantdock.placement import DISK, Placement


def offload_folder(placement: Placement, options: LoadOptions) -> str | None:
    """The folder for what goes to the disk, made if it isn't there; ``None`` when nothing goes there.

    Raises:
        PlacementError: it is needed, and wasn't given.
    """
    if not placement.offloads:
        return None
    if options.offload_dir is None:
        raise PlacementError("device_map puts a part of the model on disk; pass offload_dir= for it")
    os.makedirs(options.offload_dir, exist_ok=True)
    return os.fspath(options.offload_dir)


def dispatch(
    model: torch.nn.Module,
    placement: Placement,
    offload_dir: str | None,
    offload_index: dict[str, Any],
    options: Mapping[str, Any],
) -> None:
    """Hand a model that is on more than one device to accelerate.

    Args:
        model: the model, every parameter where it belongs.
        placement: the devices.
        offload_dir: where the offloaded parameters are.
        offload_index: what is there.
        options: more arguments of ``accelerate.dispatch_model``.
    """
    if placement.single is not None:
        return
    from accelerate import disk_offload, dispatch_model
    from accelerate.utils import save_offload_index

    if offload_dir is not None:
        save_offload_index(offload_index, offload_dir)
        if set(map(str, placement.device_map.values())) == {DISK}:
            disk_offload(model, offload_dir, execution_device=torch.device("cpu"))
            return
    dispatch_model(
        model,
        device_map={name: _accelerate_device(device) for name, device in placement.device_map.items()},
        offload_dir=offload_dir,
        offload_index=offload_index or None,
        **options,
    )


def _accelerate_device(device: torch.device | str) -> Any:
    if isinstance(device, str):
        return device
    return device.index if device.type == "cuda" and device.index is not None else str(device)
