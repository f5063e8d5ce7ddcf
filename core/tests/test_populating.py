"""Views of mapped files enter the page tables while the load goes on."""

from __future__ import annotations

import mmap
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import quantdock
from quantdock.populating import mapped_ranges

_ROWS = 4096
"""Rows of 1 KiB: a matrix of 4 MiB."""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="page tables are looked at in /proc")


class Stack(nn.Module):
    """Three matrices; the middle one is cast when it is stored in another dtype."""

    def __init__(self) -> None:
        super().__init__()
        for name in "abc":
            self.register_parameter(name, nn.Parameter(torch.empty(_ROWS, 256)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"torch_dtype": "float32"}', encoding="utf-8")
    tensors = {name: torch.full((_ROWS, 256), float(index)) for index, name in enumerate("abc")}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def _resident(path: Path) -> int:
    """Bytes of this process's maps of ``path`` that are in its page tables."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if "-" in line.split(" ", 1)[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def _settle() -> None:
    for thread in threading.enumerate():
        if thread.name == "quantdock-populate":
            thread.join()


def test_what_stays_mapped_is_resident_before_anybody_reads_it(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.read_bytes()  # into the page cache
    model = quantdock.load(folder, model=Stack)
    _settle()
    assert _resident(path) >= 3 * _ROWS * 1024
    assert torch.equal(model.c, torch.full((_ROWS, 256), 2.0))


def test_what_is_cast_is_let_go(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.read_bytes()
    quantdock.load(folder, model=Stack, dtype="bfloat16")
    _settle()
    assert _resident(path) <= 2 * mmap.PAGESIZE


def test_only_mapped_parameters_are_populated_and_neighbours_at_once(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    tensors = {
        "a": torch.zeros(_ROWS, 256),
        "b": torch.zeros(_ROWS, 256, dtype=torch.float16),
        "c": torch.zeros(_ROWS, 256),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    units = quantdock.plan(tmp_path, model=Stack, dtype="float32").units
    ranges = sorted((start, stop) for _, start, stop in mapped_ranges(units))
    sizes = sorted(stop - start for start, stop in ranges)
    assert sizes in ([8 << 20], [4 << 20, 4 << 20])  # the order of the tensors is the writer's
    cast = next(unit for unit in units if unit.targets[0].parameter.name == "b").sources[0]
    assert all(stop <= cast.offset or start >= cast.offset + cast.stored_nbytes for start, stop in ranges)


def test_a_program_that_ends_right_after_the_load_ends_well(folder: Path) -> None:
    script = (
        "import sys, torch, quantdock\n"
        "from core.tests.test_populating import Stack\n"
        "import quantdock.populating as populating\n"
        "populating._PIECE = 1 << 16\n"
        "model = quantdock.load(sys.argv[1], model=Stack)\n"
        "print('loaded', flush=True)\n"
    )
    root = Path(__file__).parents[2]
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", script, str(folder)], check=False, capture_output=True, text=True, cwd=root
        )
        assert (done.returncode, done.stdout) == (0, "loaded\n"), done.stderr
