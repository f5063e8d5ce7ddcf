"""Kernels on devices are believed when they have multiplied rightly there.

What a kernel does on a device is up to the GPU, its driver, a compiler and torch's build, any of which may be one that
nobody has tried. So each is given a small product with a known result, once per process and device, before it is taken.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import torch

logger = logging.getLogger("quantdock")

_lock = threading.RLock()
_found: dict[tuple[str, torch.device], bool] = {}


def trusted(kernel: str, device: torch.device, trial: Callable[[torch.device], bool]) -> bool:
    """Whether a kernel works on a device. If it doesn't, the reason is logged as a warning, once.

    While a CUDA graph is captured, none does that hasn't been tried before: the trial would become a part of the graph.

    Args:
        kernel: its name, for the warning too.
        device: on which it would be used, such as ``cuda:1``.
        trial: uses the kernel on a small case, and says whether the result is right; called once for each kernel and
            device. What it raises counts as a wrong result.
    """
    if device == torch.device("cuda"):
        device = torch.device("cuda", torch.cuda.current_device())
    with _lock:
        known = _found.get((kernel, device))
        if known is None:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return False
            known = _found[kernel, device] = _try(kernel, device, trial)
        return known


def _try(kernel: str, device: torch.device, trial: Callable[[torch.device], bool]) -> bool:
    try:
        # A first use may be in a context of the user's, which a trial is none of the business of.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
            right, reason = trial(device), "its result on a small weight is not the right one"
    except Exception as error:  # noqa: BLE001 - compilers and drivers raise what they like; users read it below
        right, reason = False, f"{type(error).__name__}: {error}"
    if not right:
        logger.warning(
            "The kernel %r is not used on %s: %s. Layers that would take it multiply in another way, which may be "
            "slower; quantdock.report(model) says in which.",
            kernel,
            _called(device),
            reason,
        )
    return right


def _called(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
