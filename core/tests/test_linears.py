"""Linear layers over grouped integers: every path computes the weight, and none of them leaves a trace."""

from __future__ import annotations

import copy
import os
import pickle
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantdock.linears import crossover
from quantdock.ops.choice import kernels
from quantdock.testing import in_new_process

sys.path.insert(0, str(Path(__file__).parent))
from plain_layers import LAYERS, PlainLinear, exact, relative

FAST = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
needs_kernels = pytest.mark.skipif(not FAST, reason="kernels for packed integers need AVX2")
_kernels = kernels()
COMPILED = _kernels is not None and _kernels.has_fast_products()
"""Whether quantdock-kernels is there; torch's kernels are for where it isn't, and tested by turning it off."""


@pytest.fixture(params=list(LAYERS))
def layer(request: pytest.FixtureRequest) -> PlainLinear:
    return copy.deepcopy(LAYERS[request.param][0])


@needs_kernels
@pytest.mark.parametrize("name", list(LAYERS))
def test_the_path_is_the_one_of_the_table(name: str) -> None:
    layer, path = copy.deepcopy(LAYERS[name][0]), LAYERS[name][1 if COMPILED else 2]
    exact = "words" if path == "words" else "columns"
    for _ in range(2):  # before a kernel's form stands in for the codes, and after
        assert layer.paths() == {"bfloat16": path, "float16": path, "float32": exact}
        layer(torch.ones(1, layer.in_features, dtype=torch.bfloat16))
    layer.compute_dtype = torch.bfloat16
    assert set(layer.paths().values()) == {path}
    for dtype in (torch.float16, torch.float32):
        layer.compute_dtype = dtype
        assert set(layer.paths().values()) == {exact}


@pytest.mark.parametrize("rows", [1, 5, 70, 300])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 8e-3), (torch.float16, 8e-3), (torch.float32, 1e-6)])
def test_every_path_computes_the_weight(layer: PlainLinear, rows: int, dtype: torch.dtype, bound: float) -> None:
    x = torch.randn(rows, layer.in_features, generator=torch.Generator().manual_seed(rows)).to(dtype)
    expected = x.double() @ exact(layer).t() + (0 if layer.bias is None else layer.bias.double())
    for _ in range(2):  # what the first leaves behind is what the second starts with
        found = layer(x.view(1, rows, -1))
        assert (found.dtype, found.shape) == (dtype, (1, rows, layer.out_features))
        assert relative(found[0], expected) <= bound


@pytest.mark.parametrize("rows", [1, 70])
def test_float16_is_exact_if_that_is_asked_for(layer: PlainLinear, rows: int) -> None:
    layer.compute_dtype, layer.bias = torch.float16, None
    x = torch.randn(rows, layer.in_features, generator=torch.Generator().manual_seed(rows)).half()
    for _ in range(2):
        assert relative(layer(x), x.double() @ exact(layer).t()) <= 1e-3
        layer.compute_dtype = None
        layer(x)  # through a kernel, which leaves its form in the codes' place
        layer.compute_dtype = torch.float16


@needs_kernels
@pytest.mark.parametrize("rows", [1, 3, 65])
def test_kernels_and_dequantizing_give_the_same(layer: PlainLinear, rows: int) -> None:
    """Whichever side of the crossover a number of rows is on, on this CPU or another."""
    x = torch.randn(rows, layer.in_features, generator=torch.Generator().manual_seed(rows)).bfloat16()
    layer.bias = None
    expected = x.double() @ exact(layer).t()
    layer(x)
    if layer._form is not None:
        for most in (0, rows):
            layer._form = copy.copy(layer._form)
            object.__setattr__(layer._form, "most_rows", most)
            assert relative(layer(x), expected) <= 8e-3


@needs_kernels
@pytest.mark.parametrize("path", ["words", "int4pack", "int8pack"])
def test_the_crossover_of_each_cpu_is_in_the_table(path: str) -> None:
    most = [rows[path] for rows in crossover.ROWS.values()]
    assert most == sorted(most)  # the less the CPU has for bfloat16, the longer the kernels are worth it
    assert crossover.most_rows(path) in most


@pytest.mark.parametrize("offset", [0, 1, 4, 8, 16])
def test_activations_may_start_anywhere(layer: PlainLinear, offset: int) -> None:
    size = layer.in_features
    x = torch.randn(offset + 3 * size, generator=torch.Generator().manual_seed(1)).bfloat16()[offset:].view(3, size)
    assert torch.equal(layer(x), layer(x.clone()))
    apart = torch.stack([x, x], dim=-1)[..., 0]  # every other element of a tensor
    assert torch.equal(layer(apart), layer(x))
    assert torch.equal(layer(x[1]), layer(x[1:2])[0])


def test_the_weight_is_rounded_once(layer: PlainLinear) -> None:
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        assert torch.equal(layer.dequantized(dtype), exact(layer).to(dtype))


def test_no_rows(layer: PlainLinear) -> None:
    found = layer(torch.empty(2, 0, layer.in_features, dtype=torch.bfloat16))
    assert found.shape == (2, 0, layer.out_features)


def test_activations_have_any_dimensions(layer: PlainLinear) -> None:
    x = torch.randn(6, layer.in_features, generator=torch.Generator().manual_seed(2)).bfloat16()
    expected = layer(x)
    for shape in ((6,), (2, 3), (1, 6, 1), (6, 1, 1)):
        assert torch.equal(layer(x.view(*shape, -1)), expected.view(*shape, -1))
    torch.testing.assert_close(layer(x[4]), expected[4], atol=0.02, rtol=0.02)  # one row may have another path


def test_activations_of_another_width(layer: PlainLinear) -> None:
    wide = 2 * layer.in_features
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"shape \(3, {wide}\), expected \[\.\.\., {layer.in_features}\]"):
            layer(torch.ones(3, wide, dtype=torch.bfloat16))
        layer(torch.ones(3, layer.in_features, dtype=torch.bfloat16))


def test_compute_dtype(layer: PlainLinear) -> None:
    x = torch.randn(3, layer.in_features)
    expected = layer(x.bfloat16()).float()
    layer.compute_dtype = torch.bfloat16
    found = layer(x)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gradients_are_those_of_the_weight(layer: PlainLinear, dtype: torch.dtype) -> None:
    for training in (True, False):
        layer.train(training)
        x = torch.randn(3, layer.in_features).to(dtype).requires_grad_()
        weights = torch.randn(3, layer.out_features)
        (layer(x).float() * weights).sum().backward()
        expected = weights.double() @ exact(layer)
        assert x.grad is not None
        assert (x.grad.double() - expected).norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * expected.norm()


def moved(layer: PlainLinear) -> PlainLinear:
    return layer.to(torch.float64).to(torch.float32)


def used(dtype: torch.dtype, rows: int) -> Callable[[PlainLinear], PlainLinear]:
    def use(layer: PlainLinear) -> PlainLinear:
        with torch.inference_mode():
            layer(torch.ones(rows, layer.in_features, dtype=dtype))
        return layer

    return use


def reloaded(layer: PlainLinear) -> PlainLinear:
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in state.items()})
    layer(torch.ones(1, layer.in_features, dtype=torch.bfloat16))
    layer.load_state_dict(state)
    return layer


ACTIONS: Mapping[str, Callable[[PlainLinear], PlainLinear]] = {
    "use": used(torch.bfloat16, 1),
    "use more rows": used(torch.bfloat16, 300),
    "use in float16": used(torch.float16, 3),
    "use in float32": used(torch.float32, 2),
    "copy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "move": moved,
    "train": lambda layer: layer.train(),
    "evaluate": lambda layer: layer.eval(),
    "reload": reloaded,
}


@settings(deadline=None, max_examples=60)
@given(name=st.sampled_from(list(LAYERS)), actions=st.lists(st.sampled_from(list(ACTIONS)), min_size=1, max_size=6))
def test_stored_tensors_survive(name: str, actions: list[str]) -> None:
    layer = copy.deepcopy(LAYERS[name][0])
    before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    x = torch.randn(2, layer.in_features).bfloat16()
    with torch.no_grad():
        expected = layer.eval()(x)
    for action in actions:
        layer = ACTIONS[action](layer)
        state = layer.state_dict()
        assert state.keys() == before.keys(), action
        for key, tensor in before.items():
            assert state[key].dtype == tensor.dtype, (action, key)
            assert torch.equal(state[key], tensor), (action, key)
        assert torch.equal(layer.code, before["code"]), action
    with torch.no_grad():
        assert torch.equal(layer.eval()(x), expected)


@needs_kernels
def test_the_codes_are_in_memory_once() -> None:
    layer = copy.deepcopy(LAYERS["4 bits"][0])
    layer(torch.ones(1, 256, dtype=torch.bfloat16))
    assert "code" not in dict(layer.named_buffers())
    layer.train()
    assert "code" in dict(layer.named_buffers())


_OTHER_CPU = """
import torch
from quantdock.linears import int4
class Weight:
    bits, inputs, outputs = 4, 128, 64 + 32 + 16
    def codes(self, part): return CODES[:, part]
    def scales(self, part): return torch.ones(1, 112)[:, part]
    def zeros(self, part): return torch.full((1, 112), 8, dtype=torch.uint8)[:, part]
    def grouping(self): return 128
CODES = torch.randint(0, 16, (128, 112), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
form = int4.make(Weight())
assert torch.equal(form.codes(slice(0, 112)), CODES)
assert torch.equal(form.codes(slice(64, 112)), CODES[:, 64:])
assert torch.equal(form.columns(slice(0, 112), torch.bfloat16), CODES.bfloat16() - 8)
print(form.packed.tolist())
"""


def test_the_order_of_other_cpus_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch packs 4 bits in another order for each instruction set, which is documented nowhere."""
    found = set()
    for capability in ("default", "avx2", os.environ.get("ATEN_CPU_CAPABILITY", "avx512")):
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", capability)
        found.add(in_new_process("-c", _OTHER_CPU))
    assert len(found) > 1 or not FAST
