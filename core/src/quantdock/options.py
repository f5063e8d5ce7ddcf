"""Everything a user can pass to ``load``, in one frozen object that the stages see."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from quantdock.errors import ConfigError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(value: int | str, *, option: str) -> int:
    """Bytes from ``268435456``, ``"256MiB"`` or ``"2 GB"`` (powers of 1024 with an ``i``, of 1000 without).

    Raises:
        ConfigError: it isn't a positive size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(value))
    unit = None if match is None else _UNITS.get(match[2].upper())
    if match is None or unit is None or (size := int(float(match[1]) * unit)) <= 0:
        raise ConfigError(f"{option}={value!r} is not a size; write bytes, or a number with a unit such as '256MiB'")
    return size


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """The arguments of ``quantdock.load`` (which documents them), validated."""

    quantize: Any = None
    dtype: torch.dtype | str = "auto"
    device_map: str | int | torch.device | Mapping[str, Any] | None = None
    max_memory: Mapping[Any, int | str] | None = None
    offload_dir: str | os.PathLike[str] | None = None
    memory_budget: int | str = "256MiB"
    workers: int | None = None
    revision: str | None = None
    cache_dir: str | os.PathLike[str] | None = None
    token: str | bool | None = None
    local_files_only: bool = False
    force_download: bool = False
    variant: str | None = None
    use_safetensors: bool = True
    config: Any = None
    config_overrides: Mapping[str, Any] | None = None
    trust_remote_code: bool = False
    attn_implementation: str | None = None
    model: Callable[..., torch.nn.Module] | None = None
    task: str = "causal-lm"
    skip: Sequence[str] = ()
    allow_missing: Sequence[str] = ()
    ignore_unexpected: Sequence[str] = ()
    ignore_mismatched_sizes: bool = False
    policy: str | os.PathLike[str] | None = None
    plugins: Sequence[object] = ()
    progress: bool | Callable[..., object] | None = None
    cache: bool | None = None
    extras: Mapping[str, Any] = field(default_factory=dict)
    """Arguments for one stage plugin, by its own documentation; the drop-in classes use it."""

    def __post_init__(self) -> None:
        for name in ("skip", "allow_missing", "ignore_unexpected"):
            value = getattr(self, name)
            if isinstance(value, str) or not all(isinstance(pattern, str) for pattern in value):
                raise ConfigError(f"{name}={value!r}: expected a list of patterns, such as [{value!r}]")
            object.__setattr__(self, name, tuple(value))
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"workers={self.workers}: expected at least 1")
        if self.cache not in (None, True, False):
            raise ConfigError(f"cache={self.cache!r}: expected True or False; QUANTDOCK_CACHE_DIR names the folder")
        if self.dtype != "auto":
            settled = parse_dtype(self.dtype) if isinstance(self.dtype, str) else check_dtype(self.dtype)
            object.__setattr__(self, "dtype", settled)
        parse_bytes(self.memory_budget, option="memory_budget")

    @property
    def budget(self) -> int:
        """``memory_budget`` in bytes."""
        return parse_bytes(self.memory_budget, option="memory_budget")

    @property
    def worker_count(self) -> int:
        """``workers``, or one per core up to 8."""
        return self.workers or max(1, min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4))

    @property
    def settled_dtype(self) -> torch.dtype:
        """``dtype`` once it is no longer ``"auto"``."""
        assert isinstance(self.dtype, torch.dtype), "the dtype is settled before the model is built"
        return self.dtype


def parse_dtype(name: str, *, option: str = "dtype") -> torch.dtype:
    """A floating dtype by its torch name.

    Raises:
        ConfigError: there is no such floating dtype.
    """
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"{option}={name!r}: expected 'auto' or a floating torch dtype such as 'bfloat16'")
    return check_dtype(dtype, option=option)


def check_dtype(dtype: torch.dtype, *, option: str = "dtype") -> torch.dtype:
    """``dtype``, if a model can be in it.

    Raises:
        ConfigError: it isn't a floating dtype of 16 bits or more.
    """
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise ConfigError(f"{option}={dtype}: a model is loaded in a floating dtype of 16 bits or more; see quantize=")
    return dtype


def as_path(value: str | os.PathLike[str]) -> Path:
    """A path with ``~`` expanded."""
    return Path(value).expanduser()
