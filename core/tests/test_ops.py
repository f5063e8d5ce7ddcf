"""Operations: what they are defined to compute, told element by element, and how an implementation is chosen."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantdock import ConfigError, ops
from quantdock.ops import choice, search_4bit, table_4bit
from quantdock.ops.chunks import CHUNK, LARGE_CHUNK, chunk

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
UNEVEN = [-0.9, -0.6, -0.5, -0.3, -0.29, -0.1, -0.01, 0.0, 0.02, 0.1, 0.2, 0.3, 0.5, 0.7, 0.95]


def single(value: float) -> float:
    """The nearest float32."""
    return torch.tensor(value, dtype=torch.float32).item()


def quantize_4bit(flat: Tensor, bounds: Tensor, codes: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    packed = torch.empty((len(flat) + 1) // 2, dtype=torch.uint8)
    absmax = torch.empty(-(-len(flat) // blocksize))
    ops.quantize_blockwise_4bit(flat, bounds=bounds, codes=codes, blocksize=blocksize, packed=packed, absmax=absmax)
    return packed, absmax


@settings(deadline=None, max_examples=60)
@given(
    values=st.lists(st.floats(width=16), min_size=1, max_size=70),
    blocksize=st.sampled_from([2, 6, 8, 32]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32),
)
def test_4bit_element_by_element(values: list[float], blocksize: int, dtype: torch.dtype, seed: int) -> None:
    flat = torch.tensor(values).to(dtype)
    values = flat.float().tolist()
    generator = torch.Generator().manual_seed(seed)
    bounds = torch.rand(15, generator=generator).mul(2).sub(1).sort().values if seed % 2 else torch.tensor(UNEVEN)
    codes = torch.randperm(16, generator=generator).to(torch.uint8)
    packed, absmax = quantize_4bit(flat, bounds, codes, blocksize)
    found = [half for byte in packed.tolist() for half in (byte >> 4, byte & 15)]
    for start in range(0, len(values), blocksize):
        block = values[start : start + blocksize]
        largest = math.nan if any(map(math.isnan, block)) else max(map(abs, block))
        scale = largest if largest != largest else max(largest, single(1e-38))
        stored = largest if len(block) == blocksize else scale
        assert absmax[start // blocksize].item() == pytest.approx(stored, rel=0, abs=0, nan_ok=True)
        for index, value in enumerate(block):
            if len(block) == blocksize:
                normal = single(
                    value * (single(1 / scale) if math.isfinite(scale) else 0.0 / scale if scale != scale else 0.0)
                )
            else:
                normal = single(value / scale) if not (math.isinf(value) and math.isinf(scale)) else math.nan
            rank = sum(not normal <= bound for bound in bounds.tolist())
            assert found[start + index] == codes[rank]
    if len(values) % 2:
        assert found[-1] == codes[sum(bound < 0.0 for bound in bounds.tolist())]


@pytest.mark.parametrize("bounds", [UNEVEN, [value / 1000 for value in UNEVEN]], ids=["apart", "close"])
@pytest.mark.parametrize("special", [0.0, 5.0, math.inf, math.nan])
@pytest.mark.parametrize("threads", [1, 2])
def test_4bit_across_chunks(bounds: list[float], special: float, threads: int) -> None:
    """The way that torch takes through a table, and the compiled one, are a search."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        flat = torch.randn((11 if threads == 1 else 2) * CHUNK + 4 * 64, generator=torch.Generator().manual_seed(0))
        flat[CHUNK + 5 : CHUNK + 2000 : 50] = special
        # A value that is at a bound of its block.
        flat[:64] = torch.cat([torch.tensor(bounds), torch.ones(49)])
        limits, codes = torch.tensor(bounds), torch.arange(15, -1, -1, dtype=torch.uint8)
        packed, absmax = quantize_4bit(flat, limits, codes, 64)
        expected, scales = torch.empty_like(packed), torch.empty_like(absmax)
        search_4bit.quantize(flat, limits, codes, 64, expected, scales)
        assert torch.equal(packed, expected)
        assert torch.equal(absmax.nan_to_num(-1), scales.nan_to_num(-1))
    finally:
        torch.set_num_threads(before)


def test_bounds_too_close_for_a_table() -> None:
    codes = tuple(range(16))
    assert table_4bit.table_of(tuple(UNEVEN), codes) is not None
    assert table_4bit.table_of(tuple(value / 10000 for value in UNEVEN), codes) is None


@settings(deadline=None, max_examples=60)
@given(
    values=st.lists(st.floats(width=32), min_size=1, max_size=70),
    blocksize=st.sampled_from([2, 6, 64]),
    dtype=st.sampled_from(DTYPES),
)
def test_8bit_element_by_element(values: list[float], blocksize: int, dtype: torch.dtype) -> None:
    flat = torch.tensor(values).to(dtype)
    table = torch.randint(0, 256, (1 << 16,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    codes, absmax = torch.empty(len(flat), dtype=torch.uint8), torch.empty(-(-len(flat) // blocksize))
    ops.quantize_blockwise_8bit(flat, table=table, blocksize=blocksize, codes=codes, absmax=absmax)
    for start in range(0, len(flat), blocksize):
        block = flat[start : start + blocksize].float()
        numbers = [abs(value) for value in block.tolist() if not math.isnan(value)]
        assert absmax[start // blocksize] == max(numbers, default=0.0)
        factor = torch.tensor(max(numbers, default=0.0)).reciprocal()
        for index, value in enumerate((block * factor).tolist()):
            if math.isnan(value):
                cell = 0
            else:
                half = single(single(min(max(value, -1.0), 1.0) + 1) * 0.5)
                cell = int(single(half * 65535 + 0.5))
            assert codes[start + index] == table[cell]


@settings(deadline=None, max_examples=60)
@given(
    values=st.lists(st.floats(width=32), min_size=1, max_size=60),
    columns=st.integers(1, 60),
    dtype=st.sampled_from(DTYPES),
    transposed=st.booleans(),
)
def test_rows_element_by_element(values: list[float], columns: int, dtype: torch.dtype, transposed: bool) -> None:
    columns = min(columns, len(values))
    matrix = torch.tensor(values[: len(values) // columns * columns]).view(-1, columns).to(dtype)
    matrix = matrix.t() if transposed else matrix
    codes, scales = torch.empty(matrix.shape, dtype=torch.int8), torch.empty(len(matrix))
    ops.quantize_rows_int8(matrix, codes=codes, scales=scales)
    for row, found, scale in zip(matrix.half().tolist(), codes.tolist(), scales.tolist(), strict=True):
        if any(map(math.isnan, row)):
            assert math.isnan(scale)
            assert not any(found)
            continue
        assert scale == max(map(abs, row))
        if scale == 0 or math.isinf(scale):
            assert not any(found)
            continue
        factor = single(single(1 / scale) * 127)
        assert found == [round(single(value * factor)) for value in row]


def test_rows_without_elements() -> None:
    scales = torch.ones(3)
    ops.quantize_rows_int8(torch.empty(3, 0), codes=torch.empty(3, 0, dtype=torch.int8), scales=scales)
    assert not scales.any()
    ops.quantize_rows_int8(torch.empty(0, 3), codes=torch.empty(0, 3, dtype=torch.int8), scales=torch.empty(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flat": torch.ones(8, 16)}, "flat is torch.float32 [8, 16] on cpu, expected a contiguous vector of floats"),
        ({"flat": torch.ones(256)[::2]}, "expected a contiguous vector"),
        ({"flat": torch.ones(128, device="meta")}, "on meta, expected"),
        ({"flat": torch.ones(128, dtype=torch.int32)}, "flat is torch.int32"),
        ({"bounds": torch.ones(16)}, "bounds is torch.float32 [16] on cpu, contiguous; expected torch.float32 [15]"),
        ({"codes": torch.arange(16)}, "codes is torch.int64 [16]"),
        ({"packed": torch.zeros(1, dtype=torch.uint8)}, "packed is torch.uint8 [1]"),
        ({"packed": torch.zeros(128, dtype=torch.uint8)[::2]}, "not contiguous; expected torch.uint8 [64]"),
        ({"absmax": torch.zeros(1)}, "absmax is torch.float32 [1]"),
        ({"blocksize": 0}, "blocksize is 0, expected a positive even number"),
        ({"blocksize": 3}, "blocksize is 3"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "flat": torch.ones(128),
        "bounds": torch.tensor(UNEVEN),
        "codes": torch.arange(16, dtype=torch.uint8),
        "blocksize": 64,
        "packed": torch.zeros(64, dtype=torch.uint8),
        "absmax": torch.zeros(2),
    } | change
    with pytest.raises(ValueError, match=re.escape(message)):
        ops.quantize_blockwise_4bit(arguments.pop("flat"), **arguments)
    assert not arguments["packed"].any()
    assert not arguments["absmax"].any()


def test_chunks_follow_the_threads_that_torch_has() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert chunk() == LARGE_CHUNK
        torch.set_num_threads(2)
        assert chunk() == CHUNK
        assert chunk(4096 * 3) == 4096 * 6
        assert chunk(10**6) == 10**6
    finally:
        torch.set_num_threads(before)


def run(program: str, **environment: str) -> str:
    found = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | environment, capture_output=True, check=False, text=True
    )
    return found.stdout.strip() or found.stderr.strip().splitlines()[-1]


TELL = "from quantdock import ops; print(ops.implementation())"


@pytest.fixture
def undecided(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """As in a process that has used no operation yet, before and after."""
    choice._choice.cache_clear()
    yield monkeypatch
    choice._choice.cache_clear()


def test_it_is_told_which_implementation_runs(undecided: pytest.MonkeyPatch) -> None:
    undecided.setenv("QUANTDOCK_KERNELS", "off")
    assert ops.implementation() == "torch (QUANTDOCK_KERNELS is 'off')"
    undecided.setenv("QUANTDOCK_KERNELS", "")
    undecided.setitem(sys.modules, "quantdock_kernels", None)
    choice._choice.cache_clear()
    assert ops.implementation() == "torch (quantdock-kernels is not installed)"


def test_what_compiled_code_is_used(tmp_path: Path) -> None:
    """Packages of another ABI, or with a library that doesn't load, are left alone, and the reason is told."""
    package = tmp_path / "quantdock_kernels"
    package.mkdir()
    # Before the finder of an editable install.
    first = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.meta_path.insert(0, sys.meta_path[-1]); {TELL}"
    (package / "__init__.py").write_text("ABI = 0\n__version__ = '0.0.9'\n")
    needed = f"torch (quantdock-kernels 0.0.9 has ABI 0, this quantdock needs {choice._ABI})"
    assert run(first, QUANTDOCK_KERNELS="") == needed
    (package / "__init__.py").write_text("raise ImportError('the compiled library is damaged')\n")
    assert run(first, QUANTDOCK_KERNELS="") == "torch (the compiled library is damaged)"
    (package / "__init__.py").write_text("import a_module_that_is_missing\n")
    assert "can't be imported: No module named 'a_module_that_is_missing'" in run(first, QUANTDOCK_KERNELS="")


def test_an_instruction_set_that_is_not_there_is_an_error(undecided: pytest.MonkeyPatch) -> None:
    pytest.importorskip("quantdock_kernels", reason="only compiled code has instruction sets")
    undecided.setenv("QUANTDOCK_KERNELS", "baseline")
    assert re.fullmatch(r"quantdock-kernels \S+ \(baseline\)", ops.implementation())
    choice._choice.cache_clear()
    undecided.setenv("QUANTDOCK_KERNELS", "mmx")
    with pytest.raises(ConfigError, match="QUANTDOCK_KERNELS is 'mmx', expected 'off'"):
        ops.implementation()


def test_importing_quantdock_imports_no_operation() -> None:
    program = "import sys, quantdock; print([name for name in sys.modules if name.startswith('quantdock.ops')])"
    assert run(program) == "[]"
