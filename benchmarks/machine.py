"""Where a benchmark ran: the first lines of every table."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "safetensors",
    "bitsandbytes",
    "gptqmodel",
    "quantdock",
    "quantdock-bnb",
    "quantdock-kernels",
    "quantdock-transformers",
)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The hardware and system, as far as they matter here."""

    cpu: str
    cores: int
    memory_nbytes: int
    system: str
    python: str

    @classmethod
    def here(cls) -> Machine:
        """This machine; cores are those that this process may use."""
        return cls(
            cpu=_cpu(),
            cores=len(os.sched_getaffinity(0)),
            memory_nbytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            system=f"{platform.system()} {platform.release().partition('-')[0]}",
            python=platform.python_version(),
        )

    def header(self, versions: Mapping[str, str], threads: int | None = None) -> str:
        """The machine and what ran on it, a line each; threads where there are any to tell of."""
        listed = ", ".join(f"{name} {version}" for name, version in versions.items())
        lines = (
            f"machine   {self.cpu}, {self.cores} cores, {self.memory_nbytes / 2**30:.0f} GiB, {self.system}\n"
            f"versions  Python {self.python}, {listed}"
        )
        return lines if threads is None else f"{lines}\nthreads   {threads}"


def versions() -> dict[str, str]:
    """What is installed in this environment, of the packages that take part, and what quantdock's operations run on."""
    found = {}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    if "quantdock" not in found:  # another contender's environment
        return found
    from quantdock import ops

    return found | {"operations on": ops.implementation()}


def _cpu() -> str:
    """The processor's name; virtual machines often hide it, so family and model stand beside it."""
    facts: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    name = facts.get("model name", platform.processor() or platform.machine())
    if "cpu family" in facts:
        name += f" (family {facts['cpu family']}, model {facts['model']})"
    return name
