"""Kernels for GPUs, as far as they go without one: in Triton's interpreter, through its compiler, and by the order that
torch documents in its source. On a GPU, the same tests run there; ``test_gpu_linears.py`` is for GPUs alone."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantdock.linears import int4, int4_cuda, layer, triton_form
from quantdock.linears.trusting import trusted
from quantdock.testing import in_new_process, interpreted_kernels

sys.path.insert(0, str(Path(__file__).parent))
from plain_layers import PlainLinear, exact, relative

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INSTALLED = find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not INSTALLED, reason="Triton is not installed")

BOUNDS = {torch.bfloat16: 3e-3, torch.float16: 4e-4, torch.float32: 1e-6}
"""Of the relative error: half a unit in the last place of the result, about."""


@pytest.fixture(autouse=True, scope="module")
def _interpreted() -> Iterator[None]:
    here = INSTALLED and DEVICE.type == "cpu"
    with interpreted_kernels("quantdock.linears.triton_product") if here else nullcontext():
        yield


def made(*, bits: int, inputs: int, outputs: int, size: int, ordered: bool = True) -> PlainLinear:
    made = PlainLinear(bits=bits, inputs=inputs, outputs=outputs, size=size, ordered=ordered, bias=False)
    return made.to(DEVICE)


# The order of words ---------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    groups=st.integers(1, 6),
    size=st.sampled_from([8, 16, 24, 32, 100, 128]),
    outputs=st.integers(1, 140),
    ordered=st.booleans(),
)
def test_the_form_keeps_every_code(bits: int, groups: int, size: int, outputs: int, ordered: bool) -> None:
    it = made(bits=bits, inputs=groups * size, outputs=outputs, size=size, ordered=ordered)
    form = triton_form.make(it.stored_weight())
    assert torch.equal(form.codes(slice(0, outputs)), it.code)
    assert torch.equal(form.codes(slice(64, outputs)), it.code[:, 64:])
    x = torch.eye(it.in_features, device=DEVICE)
    columns = form.columns(slice(0, outputs), torch.float32)
    assert torch.equal((form.arranged(x) @ columns).double(), exact(it).t())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_take_the_bits_of_their_codes(bits: int) -> None:
    form = triton_form.make(made(bits=bits, inputs=1024, outputs=64, size=64).stored_weight())
    assert form._words.nbytes * 8 == 1024 * 64 * bits


# The kernel -----------------------------------------------------------------------------------------------------------

CASES = {
    "4 bits": {"bits": 4, "inputs": 256, "outputs": 128, "size": 128},
    "4 bits, small groups": {"bits": 4, "inputs": 192, "outputs": 70, "size": 32},
    "4 bits, groups that runs don't divide": {"bits": 4, "inputs": 192, "outputs": 70, "size": 96},
    "4 bits, one group, odd": {"bits": 4, "inputs": 97, "outputs": 33, "size": 97},
    "4 bits, any order": {"bits": 4, "inputs": 256, "outputs": 64, "size": 64, "ordered": False},
    "3 bits": {"bits": 3, "inputs": 640, "outputs": 64, "size": 128},
    "3 bits, any order": {"bits": 3, "inputs": 192, "outputs": 17, "size": 64, "ordered": False},
    "2 bits": {"bits": 2, "inputs": 320, "outputs": 64, "size": 64},
    "8 bits": {"bits": 8, "inputs": 160, "outputs": 72, "size": 160},
    "8 bits, groups": {"bits": 8, "inputs": 192, "outputs": 72, "size": 48},
}
RAGGED = {
    "4 bits": {"bits": 4, "inputs": 96, "outputs": 40, "size": 24},
    "3 bits": {"bits": 3, "inputs": 72, "outputs": 33, "size": 8, "ordered": False},
}


@needs_triton
@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("name", list(CASES))
def test_products_round_nothing_but_the_result(name: str, dtype: torch.dtype) -> None:
    it = made(**CASES[name])
    form = triton_form.make(it.stored_weight())
    for rows in (1, 17, 70):
        x = torch.randn(rows, it.in_features, generator=torch.Generator().manual_seed(rows)).to(DEVICE, dtype)
        found = form.multiply(x)
        assert (found.dtype, found.shape) == (dtype, (rows, it.out_features))
        assert relative(found, x.double() @ exact(it).t()) <= BOUNDS[dtype]
    assert torch.equal(form.multiply(x), found)


@needs_triton
@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("name", list(RAGGED))
def test_where_a_run_has_several_groups_each_weight_is_rounded(name: str, dtype: torch.dtype) -> None:
    it = made(**RAGGED[name])
    form, weight = triton_form.make(it.stored_weight()), it.dequantized(dtype)
    eye = torch.eye(it.in_features, device=DEVICE, dtype=dtype)
    cut_off = DEVICE.type == "cpu" and dtype == torch.bfloat16  # by the interpreter, where everybody else rounds
    torch.testing.assert_close(form.multiply(eye).t(), weight, atol=0, rtol=2**-7 if cut_off else 0)
    x = torch.randn(3, it.in_features, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    assert relative(form.multiply(x), x.double() @ weight.double().t()) <= (8e-3 if cut_off else BOUNDS[dtype])


@needs_triton
def test_the_identity_gives_the_weight() -> None:
    """In the dtype of the activations; this is what a device has to get right before the kernel is used on it."""
    assert triton_form.works(DEVICE)


@needs_triton
def test_what_is_not_a_number_stays_that() -> None:
    it = made(bits=4, inputs=192, outputs=70, size=64)
    form = triton_form.make(it.stored_weight())
    x = torch.ones(2, 192, dtype=torch.bfloat16, device=DEVICE)
    x[1, 7] = float("nan")
    found = form.multiply(x)
    assert found[0].isfinite().all()
    assert found[1].isnan().all()


_COMPILE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from quantdock.linears.triton_form import constants
from quantdock.linears.triton_product import product
tensors = ["x", "words", "scales", "zeros", "index", "out"]
numbers = ["rows", "inputs", "outputs", "size", "steps", "each"]
for capability, dtype, bits, sharing, block in json.loads(sys.argv[1]):
    types = dict(zip(tensors, [f"*{dtype}", "*i32", "*fp16", "*u8", "*i32", "*fp32"])) | dict.fromkeys(numbers, "i32")
    options = constants(bits, sharing, block)
    stages = options.pop("num_stages")
    options["WIDE"] = False
    signature = types | dict.fromkeys(options, "constexpr")
    aligned = {(place,): [["tt.divisibility", 16]] for place in (0, 1, 2, 3, 4, 5, 7, 8, 9)}
    made = triton.compile(
        ASTSource(product, signature, options, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_stages": stages},
    )
    print(json.dumps([made.metadata.shared, len(made.asm["cubin"]), "mma" in made.asm["ptx"]]))
"""
_SHARED = 99 * 1024
"""Bytes of shared memory for a program, on the GPUs with the least of it (compute capabilities 8.6 and 8.9)."""


@needs_triton
@pytest.mark.slow
def test_it_compiles_for_gpus() -> None:
    """Without one: the compiler comes with Triton, and so does the assembler."""
    variants = [
        (80, "bf16", 4, 8, 16),
        (80, "bf16", 2, 8, 32),
        (80, "fp16", 3, 8, 16),
        (80, "fp32", 8, 4, 64),
        (80, "bf16", 4, 0, 64),
        (90, "bf16", 4, 8, 64),
        (90, "fp16", 8, 4, 16),
    ]
    lines = in_new_process("-c", _COMPILE, json.dumps(variants)).splitlines()
    assert len(lines) == len(variants)
    for (_, dtype, *_), line in zip(variants, lines, strict=True):
        shared, size, products = json.loads(line)
        assert 0 < shared <= _SHARED
        assert size > 0
        assert products == (dtype != "fp32")  # of tensor cores


# torch's kernel for 4 bits --------------------------------------------------------------------------------------------


def packed_as_torch_does(pairs: Tensor, inner: int) -> Tensor:
    """``matrix_to_m16n8k16_Bint4_layout`` of ``int4mm.cu``, for each of its threads: ``[outputs, inputs / 2]``, with
    the even inputs in the upper halves of bytes, to ``[outputs / 8, tiles, 32, inner / 2]``."""
    outputs, across = pairs.shape[0] // 8, pairs.shape[1] // (8 * inner)
    result = torch.zeros(outputs, across, 32, inner // 2, dtype=torch.int64)
    for tile in range(outputs):
        for outer in range(across):
            for thread in range(32):
                for pair in range(0, inner, 2):
                    base = (outer * inner + pair) * 8 + thread % 4
                    row = pairs[tile * 8 + thread // 4]
                    word = 0
                    for place, column in enumerate((base, base + 4, base + 8, base + 12)):
                        word |= (int(row[column]) >> 4) << 4 * place | (int(row[column]) & 15) << 4 * place + 16
                    result[tile, outer, thread, pair // 2] = word
    return torch.where(result >= 1 << 31, result - (1 << 32), result).to(torch.int32)


@pytest.mark.parametrize(("inputs", "inner"), [(32, 2), (128, 4), (96, 2), (256, 8)])
def test_the_order_of_torch_is_undone(inputs: int, inner: int) -> None:
    codes = torch.randint(0, 16, (inputs, 24), generator=torch.Generator().manual_seed(inputs)).to(torch.uint8)
    pairs = (codes[0::2] << 4 | codes[1::2]).t().contiguous()
    packed = packed_as_torch_does(pairs, inner)
    assert torch.equal(int4_cuda.unpacked(packed), codes)
    if DEVICE.type == "cuda":
        assert torch.equal(torch._convert_weight_to_int4pack(pairs.cuda(), inner).cpu(), packed)


# What a layer does with them ------------------------------------------------------------------------------------------


@needs_triton
def test_dtypes_may_have_forms_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on GPUs, where torch's kernel takes bfloat16 and Triton's the rest: a layer has one form at a time."""
    here = {"device": DEVICE.type, "fits": lambda weight: True}
    first = dataclasses.replace(int4.MAKER, dtypes=(torch.bfloat16,), **here)
    if DEVICE.type == "cuda":
        first = int4_cuda.MAKER
    monkeypatch.setattr(layer, "_MAKERS", (first, dataclasses.replace(triton_form.MAKER, **here)))
    it = made(bits=4, inputs=128, outputs=64, size=64)
    before = {name: tensor.clone() for name, tensor in it.state_dict().items()}
    assert it.paths() == {"bfloat16": "int4pack", "float16": "triton", "float32": "triton"}
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
        with torch.no_grad():
            assert relative(it(x), x.double() @ exact(it).t()) <= (8e-3 if dtype == torch.bfloat16 else 1e-3)
        assert it._form is not None
        assert it._form.path == it.path(dtype)
        assert "code" not in dict(it.named_buffers())
        for name, tensor in before.items():
            assert torch.equal(it.state_dict()[name], tensor)


# Trust ----------------------------------------------------------------------------------------------------------------


def _fails(device: torch.device) -> bool:
    raise RuntimeError("no kernel image is available")


@pytest.mark.parametrize(
    ("name", "trial", "reason"),
    [
        ("one that fails", _fails, "RuntimeError: no kernel image is available"),
        ("one that errs", lambda device: False, "not the right one"),
    ],
)
def test_a_kernel_that_fails_its_trial_is_not_used(
    name: str, trial: object, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert callable(trial)
    with caplog.at_level(logging.WARNING, "quantdock"):
        assert not trusted(name, torch.device("cpu"), trial)
        assert not trusted(name, torch.device("cpu"), lambda device: True)  # it isn't asked again
    (record,) = caplog.records
    assert reason in record.getMessage()
    assert name in record.getMessage()
    assert "cpu" in record.getMessage()


def test_a_trial_is_not_the_contexts_that_it_happens_in() -> None:
    def trial(device: torch.device) -> bool:
        made = torch.ones(2, device=device) @ torch.ones(2, 2, device=device)
        return made.dtype == torch.float32 and not torch.is_inference_mode_enabled() and not torch.is_grad_enabled()

    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert trusted("one that looks around", torch.device("cpu"), trial)
