"""What a recording says about the plan, the machine and the versions at work."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantdock.tables import grouped

if TYPE_CHECKING:
    from quantdock.planning import Plan


def of_plan(plan: Plan) -> dict[str, Any]:
    """What a plan predicts, as JSON-ready data."""
    entries = plan.ledger.entries
    on_host = sum(entry.nbytes for entry in entries if entry.device == "cpu")
    elsewhere = any(entry.device != "cpu" for entry in entries)
    return {
        "source": dict(plan.source.identity),
        "format": plan.checkpoint.format,
        "files": len(plan.checkpoint.files),
        "dtype": str(plan.options.dtype).removeprefix("torch."),
        "built_by": plan.skeleton.built_by,
        "model": type(plan.skeleton.model).__name__,
        "devices": sorted({str(device) for device in plan.placement.device_map.values()}),
        "parameters": len(entries),
        "units": len(plan.units),
        "workers": plan.options.worker_count,
        "stored_nbytes": plan.ledger.stored_nbytes,
        "resident_nbytes": plan.resident_nbytes,
        "host_nbytes": on_host if elsewhere else plan.resident_nbytes,
        "peak_nbytes": plan.peak_nbytes,
        "memory_budget": plan.options.budget,
        "largest_unit_nbytes": plan.largest_unit_nbytes,
        "groups": [
            {
                "parameters": group.parameters,
                "count": group.count,
                "action": group.action,
                "method": group.method,
                "by": group.by,
                "stored_nbytes": group.stored_nbytes,
                "nbytes": group.nbytes,
                "device": group.device,
            }
            for group in grouped(entries)
        ],
        "coverage": plan.ledger.coverage,
        "plugins": {one.dist: one.version for one in plan.catalog.decisions if one.allowed},
        "policy": plan.catalog.policy_origin,
    }


def machine() -> dict[str, Any]:
    """Processor, memory and system; what can't be known is left out."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: dict[str, Any] = {"processor": _processor(), "cores": cores, "memory_nbytes": _memory()}
    found |= {"system": platform.platform(), "python": platform.python_version()}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        found["devices"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {name: value for name, value in found.items() if value}


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    named = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return named[1] if named else platform.processor() or platform.machine()


def _memory() -> int:
    names = os.sysconf_names if hasattr(os, "sysconf_names") else {}
    if not {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= names.keys():
        return 0
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def versions(plugins: Iterable[str]) -> dict[str, str]:
    """Versions of quantdock, of these plugins, and of what they require, as installed."""
    found: dict[str, str] = {}
    required: list[str] = []
    for name in ("quantdock", *plugins):
        try:
            dist = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # a plugin object that was passed to the load
            continue
        found[name] = dist.version
        required += [one for one in dist.requires or () if "extra ==" not in one]
    for requirement in required:
        named = re.match(r"[A-Za-z0-9._-]+", requirement)
        if named is not None and named[0] not in found:
            try:
                found[named[0]] = metadata.version(named[0])
            except metadata.PackageNotFoundError:  # for another platform
                continue
    return found
