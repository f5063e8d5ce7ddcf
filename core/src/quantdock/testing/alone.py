"""A load in a process of its own: ``python -m quantdock.testing.alone FOLDER CONFIG [DEVICE]`` prints what it did."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch

from quantdock import calls
from quantdock.testing.model import SmallModel
from quantdock.testing.suite import digest


def main(folder: str, config: str, device: str = "") -> None:
    """Load the small model in ``folder``, quantized as the JSON object ``config`` says.

    Prints, as JSON: ``digest`` of the model, and ``changed``, the global settings that the quantized load changed.
    """
    fixed: dict[str, Any] = {"model": SmallModel, "workers": 1, "device_map": device or None}
    calls.plan(folder, **fixed).execute()  # what the core imports and sets isn't the plugin's doing
    before = _settings()
    model = calls.plan(folder, quantize=json.loads(config), **fixed).execute()
    after = _settings()
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    sys.stdout.write(json.dumps({"digest": digest(model), "changed": changed}))


def _settings() -> dict[str, object]:
    """What a plugin might set or patch for everybody."""
    settings: dict[str, object] = {
        "torch.get_default_dtype()": torch.get_default_dtype(),
        "torch.get_default_device()": torch.get_default_device(),
        "torch.get_num_threads()": torch.get_num_threads(),
        "torch.is_grad_enabled()": torch.is_grad_enabled(),
        "torch.are_deterministic_algorithms_enabled()": torch.are_deterministic_algorithms_enabled(),
        "torch.get_float32_matmul_precision()": torch.get_float32_matmul_precision(),
    }
    settings |= {f"os.environ[{name!r}]": value for name, value in os.environ.items()}
    for owner in (torch.nn.functional, torch.nn.Module, torch.nn.Linear, torch.nn.Embedding, torch.nn.Parameter):
        settings |= {f"{owner.__name__}.{name}": id(value) for name, value in vars(owner).items()}
    return settings


if __name__ == "__main__":
    main(*sys.argv[1:])
