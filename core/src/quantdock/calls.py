"""What users call: ``load`` and ``plan``.

Nothing here needs torch, whose import takes a second or two: the call comes first, and says what it is waiting for.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from quantdock.garbage import collected_later
from quantdock.progress import announcing

if TYPE_CHECKING:
    import torch

    from quantdock.planning import Plan

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
    cache: bool | None = None,
    extras: Mapping[str, Any] | None = None,
) -> torch.nn.Module:
    """Load a pretrained checkpoint, quantized on the way if asked to, and return the model in eval mode.

    Patterns are shell-style on dotted names; one matches a parameter or a module that contains it.

    Args:
        source: a folder, a weight file, or a repository on the Hub (``ORG/NAME``).
        quantize: a preset's name, a config object, a transformers quantization config, a config object of another
            library that a plugin claims, an object as in ``config.json``, or an ordered mapping of patterns to any of
            these or ``None`` (the first match decides).
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
        cache: keep what is quantized on disk, and take it from there in the next load of the same; docs/cache.md says
            what "the same" is. If not given, ``QUANTDOCK_CACHE`` decides.
        extras: arguments for a stage plugin, by its own documentation.

    Raises:
        QuantdockError: one of its kinds, each of which says what was found, expected, where, and what to do.
    """
    # The names above are the fields of LoadOptions, one to one.
    arguments = {name: value for name, value in locals().items() if name != "source"}
    with announcing(progress, str(source)) as announce, collected_later():
        from quantdock.loading import make_plan

        made = make_plan(source, arguments, announce, at_once=True)
    return made.execute()


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
    with collected_later():
        from quantdock.loading import make_plan

        return make_plan(source, arguments)
