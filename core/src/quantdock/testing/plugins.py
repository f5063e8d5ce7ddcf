"""Plugins for a test: real metadata and real modules in a folder, offered to this process or to a new one."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType


@contextmanager
def installed_plugin(
    folder: Path,
    *,
    dist: str,
    version: str = "1.0",
    entry_points: Mapping[str, Mapping[str, str]],
    modules: Mapping[str, str],
) -> Iterator[Path]:
    """A distribution that is found like any installed one while the block runs.

    Args:
        folder: where a folder of the distribution's own is made; two calls may share it.
        dist: the distribution's name.
        version: its version.
        entry_points: group -> name -> ``module:attribute``.
        modules: module name (``package.module`` for a part of a package) -> its source.

    Yields:
        What was put in front of ``sys.path``. Afterwards it is gone from there, and the modules from ``sys.modules``.
    """
    site = folder / f"{dist}-{version}.site"
    _write_metadata(site, dist, version, entry_points)
    packages = {name.rpartition(".")[0] for name in modules}
    for name, source in modules.items():
        _write_module(site, f"{name}.__init__" if name in packages else name, source)
    sys.path.insert(0, str(site))
    importlib.invalidate_caches()
    try:
        yield site
    finally:
        sys.path.remove(str(site))
        tops = {name.partition(".")[0] for name in modules}
        for name in [name for name in sys.modules if name.partition(".")[0] in tops]:
            del sys.modules[name]
        importlib.invalidate_caches()


def _write_metadata(site: Path, dist: str, version: str, entry_points: Mapping[str, Mapping[str, str]]) -> None:
    info = site / f"{dist.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: {version}\n", encoding="utf-8")
    lines: list[str] = []
    for group, offers in entry_points.items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in offers.items()), ""]
    (info / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")


def _write_module(site: Path, name: str, source: str) -> None:
    *packages, leaf = name.split(".")
    parent = site
    for package in packages:
        parent /= package
        parent.mkdir(exist_ok=True)
        (parent / "__init__.py").touch()  # unless it has a source of its own, which is written over this
    (parent / f"{leaf}.py").write_text(source, encoding="utf-8")


@contextmanager
def interpreted_kernels(name: str) -> Iterator[ModuleType]:
    """A module of Triton kernels that run on tensors in CPU memory while the block runs, in Triton's interpreter.

    It is imported for the block alone: whoever imported it before has kernels that are compiled, and gets such again
    afterwards.

    Args:
        name: the module's, which the code under test imports when it is about to launch a kernel.
    """
    importlib.import_module("triton.language")  # or its own functions would be for the interpreter from here on
    package, _, leaf = name.rpartition(".")
    known = sys.modules.pop(name, None)
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"  # Triton looks at it when it is given a kernel
    try:
        module = importlib.import_module(name)
    finally:
        del os.environ["TRITON_INTERPRET"]
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before
    try:
        yield module
    finally:
        del sys.modules[name]
        delattr(sys.modules[package], leaf)
        if known is not None:
            sys.modules[name] = known
            setattr(sys.modules[package], leaf, known)


def in_new_process(*arguments: str) -> str:
    """What a new Python prints, given these arguments and this process' import path.

    Raises:
        AssertionError: it failed; with what it wrote to stderr.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(os.path.abspath(entry) for entry in sys.path if entry)}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"python {' '.join(arguments)} failed:\n{done.stderr}"
    return done.stdout
