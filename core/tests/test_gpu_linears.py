"""On a CUDA device: every path computes the weight, whatever a layer did before, and none of them leaves a trace."""

from __future__ import annotations

import copy
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantdock.linears import int4_cuda, triton_form

sys.path.insert(0, str(Path(__file__).parent))
from plain_layers import LAYERS, PlainLinear, exact, relative

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
BOUNDS = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 2e-6}
TENSOR_CORES = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
TRITON = TENSOR_CORES and find_spec("triton") is not None


@pytest.fixture(params=list(LAYERS))
def layer(request: pytest.FixtureRequest) -> PlainLinear:
    return copy.deepcopy(LAYERS[request.param][0]).cuda()


@pytest.mark.skipif(not TENSOR_CORES, reason="kernels need compute capability 8.0")
def test_the_kernels_pass_their_trials() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    assert int4_cuda.works(device)
    if TRITON:
        assert triton_form.works(device)


@pytest.mark.parametrize("name", list(LAYERS))
def test_the_path_is_the_one_of_the_table(name: str) -> None:
    layer = copy.deepcopy(LAYERS[name][0]).cuda()
    otherwise = "triton" if TRITON else "columns"
    tinygemm = layer.bits == 4 and layer.size % 32 == 0 and layer.out_features % 8 == 0 and TENSOR_CORES
    expected = {"bfloat16": "int4pack" if tinygemm else otherwise, "float16": otherwise, "float32": otherwise}
    for _ in range(2):
        assert layer.paths() == expected
        layer(torch.ones(1, layer.in_features, dtype=torch.bfloat16, device="cuda"))


@pytest.mark.parametrize("rows", [1, 5, 17, 40, 129, 300])
@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_every_path_computes_the_weight(layer: PlainLinear, rows: int, dtype: torch.dtype) -> None:
    x = torch.randn(rows, layer.in_features, generator=torch.Generator().manual_seed(rows)).to("cuda", dtype)
    expected = x.double() @ exact(layer).t() + (0 if layer.bias is None else layer.bias.double())
    for _ in range(2):  # what the first leaves behind is what the second starts with
        found = layer(x.view(1, rows, -1))
        assert (found.dtype, found.shape) == (dtype, (1, rows, layer.out_features))
        assert relative(found[0], expected) <= BOUNDS[dtype]
        assert torch.equal(layer(x.view(1, rows, -1)), found)


def test_gradients_are_those_of_the_weight(layer: PlainLinear) -> None:
    x = torch.randn(3, layer.in_features, device="cuda", requires_grad=True)
    weights = torch.randn(3, layer.out_features, device="cuda")
    (layer(x) * weights).sum().backward()
    assert x.grad is not None
    assert relative(x.grad, weights.double() @ exact(layer)) <= 1e-5


USES = [(dtype, rows) for dtype in BOUNDS for rows in (1, 300)]


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(list(LAYERS)),
    steps=st.lists(st.sampled_from(["cpu", "cuda", "copy", "train", "eval", *USES]), min_size=1, max_size=7),
)
def test_stored_tensors_survive(name: str, steps: list[object]) -> None:
    layer = copy.deepcopy(LAYERS[name][0])
    before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    for step in steps:
        if isinstance(step, tuple):
            dtype, rows = step
            with torch.inference_mode():
                layer(torch.ones(rows, layer.in_features, dtype=dtype, device=layer.scale.device))
        elif step in ("cpu", "cuda"):
            layer = layer.to(str(step))
        elif step == "copy":
            layer = copy.deepcopy(layer)
        else:
            layer = layer.train(step == "train")
        for key, tensor in layer.state_dict().items():
            assert tensor.device == layer.scale.device, (step, key)
            assert torch.equal(tensor.cpu(), before[key]), (step, key)


@pytest.mark.skipif(not TENSOR_CORES, reason="kernels need compute capability 8.0")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_graph_replays_the_kernels(dtype: torch.dtype) -> None:
    layer = copy.deepcopy(LAYERS["4 bits, any order"][0]).cuda()
    x = torch.randn(2, layer.in_features, device="cuda").to(dtype)
    with torch.inference_mode():
        layer(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = layer(x)
        x.copy_(torch.randn(2, layer.in_features))
        graph.replay()
        assert torch.equal(found, layer(x))


@pytest.mark.skipif(not TENSOR_CORES, reason="kernels need compute capability 8.0")
def test_a_graph_of_an_unused_layer_makes_no_form() -> None:
    layer = copy.deepcopy(LAYERS["4 bits"][0]).cuda()
    x = torch.randn(2, layer.in_features, device="cuda").bfloat16()
    torch.ones(2, 2, device="cuda") @ torch.ones(2, 2, device="cuda")  # what cuBLAS needs, outside of a graph
    with torch.inference_mode():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = layer(x)
        graph.replay()
        assert layer._form is None
        assert relative(found, x.double() @ exact(layer).t() + layer.bias.double()) <= 8e-3


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two CUDA devices")
def test_on_another_device_than_the_current_one(layer: PlainLinear) -> None:
    layer = layer.to("cuda:1")
    x = torch.randn(3, layer.in_features, device="cuda:1").half()
    with torch.inference_mode():
        bias = 0 if layer.bias is None else layer.bias.double()
        assert relative(layer(x), x.double() @ exact(layer).t() + bias) <= 1e-3
