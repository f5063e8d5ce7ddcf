"""A wrong call is an error of Python's, and a broken library one that says so."""

from __future__ import annotations

import ctypes.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import quantdock_kernels as kernels
from quantdock_kernels import _library


def arguments_4bit(**changes: Any) -> dict[str, Any]:
    arguments = {
        "flat": torch.ones(130),
        "bounds": torch.linspace(-0.9, 0.9, 15),
        "codes": torch.arange(16, dtype=torch.uint8),
        "blocksize": 64,
        "packed": torch.zeros(65, dtype=torch.uint8),
        "absmax": torch.zeros(3),
    }
    return arguments | changes


def call_4bit(arguments: dict[str, Any]) -> None:
    kernels.quantize_4bit(arguments.pop("flat"), **arguments)


WRONG: dict[str, tuple[Any, str]] = {
    "flat": (torch.ones(132), "packed has shape (65,), expected (66,)"),
    "bounds": (torch.zeros(16), "bounds has shape (16,), expected (15,)"),
    "codes": (torch.arange(15, dtype=torch.uint8), "codes has shape (15,), expected (16,)"),
    "blocksize": (0, "blocksize is 0, expected a positive even number"),
    "packed": (torch.zeros(64, dtype=torch.uint8), "packed has shape (64,), expected (65,)"),
    "absmax": (torch.zeros(2), "absmax has shape (2,), expected (3,)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_sizes(name: str) -> None:
    value, message = WRONG[name]
    arguments = arguments_4bit(**{name: value})
    results = arguments["packed"], arguments["absmax"]
    with pytest.raises(ValueError, match=re.escape(message)):
        call_4bit(arguments)
    assert not any(result.any() for result in results)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"flat": torch.ones(130, dtype=torch.float64)}, TypeError, "flat is torch.float64, expected one of"),
        ({"flat": torch.ones(130, device="meta")}, TypeError, "flat is torch.strided on meta"),
        ({"flat": torch.ones(130).to_sparse()}, TypeError, "flat is torch.sparse_coo on cpu"),
        ({"flat": torch.ones(10, 13)}, ValueError, "expected 1 dimensions"),
        ({"flat": torch.ones(260)[::2]}, ValueError, "flat has strides (2,), expected 1"),
        ({"flat": [1.0] * 130}, TypeError, "flat is list, expected a tensor"),
        ({"flat": torch._neg_view(torch.ones(130))}, TypeError, "negated view"),
        ({"packed": torch.zeros(65, dtype=torch.int8)}, TypeError, "packed is torch.int8, expected torch.uint8"),
        ({"packed": torch.zeros(130, dtype=torch.uint8)[::2]}, ValueError, "packed has strides (2,)"),
        ({"absmax": torch.zeros(1).expand(3)}, ValueError, "absmax has strides (0,)"),
        ({"absmax": torch.zeros(3, dtype=torch.float16)}, TypeError, "absmax is torch.float16"),
        ({"blocksize": 63}, ValueError, "blocksize is 63"),
        ({"instruction_set": "mmx"}, ValueError, "instruction set 'mmx': expected one of"),
    ],
)
def test_kinds(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call_4bit(arguments_4bit(**change))


def test_the_other_kernels_check_too() -> None:
    flat, table = torch.ones(10), torch.zeros(1 << 16, dtype=torch.uint8)
    codes, absmax = torch.zeros(10, dtype=torch.uint8), torch.zeros(1)
    for change in ({"table": table[1:]}, {"codes": codes[1:]}, {"absmax": table.float()}, {"blocksize": 5}):
        right: dict[str, Any] = {"table": table, "codes": codes, "absmax": absmax, "blocksize": 64}
        with pytest.raises(ValueError, match="expected"):
            kernels.quantize_8bit(flat, **(right | change))
    matrix, scales = torch.ones(4, 6), torch.zeros(4)
    out = torch.zeros(4, 6, dtype=torch.int8)
    for wrong, result, scale in (
        (matrix.t(), out, scales),
        (matrix, out.t(), scales),
        (matrix, out, scales[1:]),
        (matrix[0], out, scales),
    ):
        with pytest.raises(ValueError, match="expected"):
            kernels.quantize_rows_int8(wrong, codes=result, scales=scale)


MATRIX, GRID = torch.ones(4, 6), torch.ones(4, 2)
BYTES, CODES = torch.zeros(4, 6, dtype=torch.uint8), torch.zeros(4, 6, dtype=torch.float8_e4m3fn)
WORDS = torch.zeros(4, 1, dtype=torch.int32)
CALLS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "group_extremes": (
        {"matrix": MATRIX, "group": 3, "smallest": GRID.clone(), "largest": GRID.clone()},
        [{"matrix": MATRIX.t()}, {"group": 0}, {"smallest": GRID[1:]}, {"largest": GRID.bfloat16()}, {"group": 2}],
    ),
    "group_magnitudes": (
        {"matrix": MATRIX, "group": 3, "magnitudes": GRID.clone()},
        [{"matrix": MATRIX.int()}, {"group": -1}, {"magnitudes": GRID.t()}, {"group": 6}],
    ),
    "encode_fp8": (
        {"matrix": MATRIX, "scales": GRID, "block": (1, 3), "divide": True, "codes": CODES},
        [{"matrix": MATRIX[0]}, {"scales": GRID.half()}, {"block": (2, 3)}, {"block": (1, 0)}, {"codes": BYTES}],
    ),
    "decode_fp8": (
        {"codes": CODES, "scales": GRID, "block": (1, 3), "out": MATRIX.clone()},
        [
            *[{"codes": CODES.t()}, {"codes": BYTES}, {"codes": CODES[0]}, {"scales": GRID[1:]}, {"block": (1, 2)}],
            *[{"out": MATRIX[1:]}, {"out": MATRIX.double()}],
        ],
    ),
    "multiply_fp8": (
        {"x": MATRIX[:2], "codes": CODES, "scales": GRID, "block": (1, 3), "out": torch.zeros(2, 4)},
        [
            *[{"codes": CODES.t()}, {"codes": BYTES}, {"scales": GRID[1:]}, {"block": (1, 2)}, {"block": (0, 3)}],
            *[{"x": MATRIX}, {"x": MATRIX[:2].half()}, {"x": MATRIX[:2, :5]}, {"x": torch.zeros(6, 2).t()}],
            *[{"out": torch.zeros(2, 6)}, {"out": torch.zeros(4, 2).t()}, {"out": torch.zeros(2, 4).double()}],
        ],
    ),
    "quantize_affine": (
        {"matrix": MATRIX, "group": 3, "scales": GRID, "shifts": GRID, "zeros": BYTES[:, :2].contiguous()}
        | {"divide": True, "lowest": 0, "highest": 15, "codes": BYTES.clone()},
        [
            *[{"matrix": MATRIX.t()}, {"group": 0}, {"group": 2}, {"scales": GRID.double()}, {"shifts": GRID.half()}],
            *[{"zeros": GRID}, {"lowest": -1}, {"highest": 256}, {"lowest": 16}, {"codes": BYTES.int()}],
            {"codes": BYTES[1:]},
        ],
    ),
    "unpack_words": (
        {"words": WORDS, "bits": 4, "dim": 1, "codes": BYTES},
        [
            *[{"words": WORDS.long()}, {"words": WORDS.t()}, {"bits": 5}, {"bits": 8}, {"dim": 2}, {"turn": True}],
            *[
                {"interleaved": True},
                {"bits": 8, "interleaved": True},
                {"codes": BYTES[1:]},
                {"codes": CODES},
                {"codes": BYTES[0]},
            ],
        ],
    ),
    "pack_words": (
        {"words": WORDS, "bits": 4, "dim": 1, "codes": BYTES},
        [{"words": WORDS[1:]}, {"bits": 1}, {"dim": -1}, {"codes": BYTES.t()}],
    ),
    "pack_blocks": (
        {"codes": BYTES, "bits": 8, "words": WORDS.new_zeros(6)},
        [
            *[{"codes": BYTES.t()}, {"codes": BYTES[0]}, {"codes": CODES}, {"codes": BYTES[:3]}, {"bits": 4}],
            *[{"bits": 3}, {"words": WORDS}, {"words": torch.zeros(6)}, {"words": WORDS.new_zeros(12)[::2]}],
        ],
    ),
    "unpack_blocks": (
        {"words": WORDS.new_zeros(6), "bits": 8, "codes": BYTES},
        [{"codes": BYTES[:, :4]}, {"codes": BYTES.t()}, {"bits": 2}, {"words": WORDS.new_zeros(6, 1)}],
    ),
    "cast": (
        {"flat": MATRIX.view(-1).bfloat16(), "out": torch.zeros(24, dtype=torch.float16)},
        [{"flat": MATRIX.half()}, {"flat": MATRIX.view(-1)}, {"out": torch.zeros(24)}, {"out": torch.zeros(23).half()}],
    ),
}
"""By kernel: a call that is right, and what makes it wrong."""


@pytest.mark.parametrize("name", CALLS)
def test_every_argument_is_checked(name: str) -> None:
    right, wrong = CALLS[name]
    getattr(kernels, name)(**right)
    for change in wrong:
        with pytest.raises((TypeError, ValueError), match="expected"):
            getattr(kernels, name)(**(right | change))


def test_a_library_that_is_something_else_is_refused(tmp_path: Path) -> None:
    damaged = tmp_path / "libquantdock_kernels.so"
    damaged.write_bytes(b"\x7fELF and no more")
    with pytest.raises(ImportError, match="install quantdock-kernels again"):
        _library.load(damaged)
    other = ctypes.util.find_library("c")
    assert other is not None
    with pytest.raises(ImportError, match="qd_abi"):
        _library.load(Path(other))


def test_a_library_of_another_abi_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(_library._library()._name)
    monkeypatch.setattr(_library, "ABI", kernels.ABI + 1)
    with pytest.raises(ImportError, match=f"has ABI {kernels.ABI}, expected {kernels.ABI + 1}"):
        _library.load(path)


def test_the_variable_names_the_instruction_set() -> None:
    program = "import quantdock_kernels as k; print(k.instruction_set())"
    for name in kernels.instruction_sets():
        environment = os.environ | {_library.VARIABLE: name}
        found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True)
        assert found.stdout.decode().strip() == name
    environment = os.environ | {_library.VARIABLE: "mmx"}
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=False)
    assert "QUANTDOCK_KERNELS is 'mmx', expected 'off'" in found.stderr.decode()
