"""Experts that are kept quantized: the tensor that decodes them, modules that hold it, and which pieces are whose."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantdock import Assembly, CalibrationBlock, CalibrationError, Parameter, Piece, TensorSpec, UnsupportedError
from quantdock.calibration.capturing import Call
from quantdock.linears import Experts, JointReading, Stack, hold, let_go, paths_of

EXPERTS, OUTPUTS, INPUTS = 3, 6, 8


@dataclass(frozen=True)
class Bytes:
    """A weight of bytes with one scale."""

    stored: Tensor
    scale: Tensor
    bits: int = 8

    @property
    def outputs(self) -> int:
        return self.stored.shape[0]

    @property
    def inputs(self) -> int:
        return self.stored.shape[1]

    def codes(self, part: slice) -> Tensor:
        return self.stored[part].t()

    def scales(self, part: slice) -> Tensor:
        return self.scale.expand(1, part.stop - part.start)

    def zeros(self, part: slice) -> Tensor:
        return torch.full((1, part.stop - part.start), 128, dtype=torch.uint8)

    def grouping(self) -> int:
        return self.inputs


def weight_of(tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Bytes:
    assert tensors["codes"].shape == shape
    return Bytes(tensors["codes"], tensors["scales"])


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Parameter(torch.ones(2))
        self.weight = nn.Parameter(torch.randn(EXPERTS, OUTPUTS, INPUTS))
        self.after = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([nn.functional.linear(x, self.weight[number]) for number in (0, 2)]).sum(0)


def made() -> tuple[Layer, Tensor]:
    """A module that holds bytes, and what they stand for."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (EXPERTS, 2, OUTPUTS // 2, INPUTS), generator=generator, dtype=torch.uint8)
    scales = torch.rand(EXPERTS, 2, generator=generator)
    layer = Layer()
    tensors = {"weight_codes": codes, "weight_scales": scales}
    specs = {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
    reading = JointReading(leaf="weight", shape=(EXPERTS, OUTPUTS, INPUTS), parts=2, weight_of=weight_of)
    hold(layer, "weight", specs, reading, torch.float32)
    layer._buffers.update(tensors)
    plain = (codes.float() - 128) * scales[..., None, None]
    return layer, plain.view(EXPERTS, OUTPUTS, INPUTS)


def test_modules_compute_with_what_they_hold() -> None:
    layer, plain = made()
    assert isinstance(layer, Layer)
    assert [name for name, _ in layer.named_parameters()] == ["before", "after"]
    assert [name for name, _ in layer.named_buffers()] == ["weight_codes", "weight_scales"]
    weight: Any = layer.weight
    assert isinstance(weight, Stack)
    assert torch.equal(weight + 0, plain)
    x = torch.randn(5, INPUTS, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(layer(x), x @ (plain[0] + plain[2]).t(), rtol=1e-4, atol=1e-3)
    offsets = torch.tensor([2, 2, 5], dtype=torch.int32)
    grouped = torch._grouped_mm(x.bfloat16(), weight.transpose(-2, -1), offs=offsets).float()
    expected = torch.cat([x[:2] @ plain[0].t(), x[2:] @ plain[2].t()])
    assert (grouped - expected).norm() < 0.02 * expected.norm()
    with pytest.raises(UnsupportedError, match="mul_ on weights of experts that are kept quantized"):
        weight.mul_(2)
    layer.half()
    assert (layer.weight.dtype, layer.before.dtype) == (torch.float16, torch.float16)
    assert layer.weight_scales.dtype == torch.float32
    let_go(layer, "weight")
    assert type(layer) is Layer
    assert [(name, tensor.shape) for name, tensor in layer.named_parameters()][1] == ("weight", plain.shape)
    assert not list(layer.buffers())


@dataclass(frozen=True)
class Floats:
    """A matrix of 8-bit floats, with a scale for each output."""

    codes: Tensor
    scales: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def decode(self, dtype: torch.dtype) -> Tensor:
        return (self.codes.float() * self.scales.float()[:, None]).to(dtype)

    def multiply(self, x: Tensor, *, plainly: bool = False) -> Tensor:
        return nn.functional.linear(x if plainly else x.round(decimals=1), self.decode(x.dtype))


@dataclass(frozen=True)
class ManyFloats:
    codes: Tensor
    scales: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.codes.shape[0], self.codes.shape[1], self.codes.shape[2]

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def matrix(self, index: int) -> Floats:
        return Floats(self.codes[index], self.scales[index])

    def path(self, dtype: torch.dtype) -> str:
        return "rounded" if dtype == torch.float32 else "decode"


@dataclass(frozen=True)
class FloatReading:
    def matrices(self, tensors: Mapping[str, Tensor]) -> ManyFloats:
        return ManyFloats(tensors["weight"], tensors["weight_scales"])


class Transposed(nn.Module):
    """Has its matrices the other way round, and what can't be pickled, which it leaves out itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, INPUTS, OUTPUTS))
        self.activation: Callable[[Tensor], Tensor] | None = lambda x: x + 1
        self.path = "its own"

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x @ self.weight[number] for number in (0, 2)]).sum(0)

    def __getstate__(self) -> Any:
        return super().__getstate__() | {"activation": None}


def made_of_floats(
    codes: torch.dtype = torch.float8_e4m3fn, scales: torch.dtype = torch.float8_e8m0fnu
) -> tuple[Transposed, Tensor]:
    """A module that holds 8-bit floats under the parameter's own name, and what they stand for."""
    generator = torch.Generator().manual_seed(0)
    stored = torch.randn(EXPERTS, OUTPUTS, INPUTS, generator=generator).to(codes)
    each = torch.randint(-3, 3, (EXPERTS, OUTPUTS), generator=generator).float().exp2().to(scales)
    layer = Transposed()
    specs = {"weight": TensorSpec.of(stored), "weight_scales": TensorSpec.of(each)}
    hold(layer, "weight", specs, FloatReading(), torch.float32, swapped=True)
    layer._parameters["weight"] = nn.Parameter(stored, requires_grad=False)
    layer._buffers["weight_scales"] = each
    return layer, (stored.float() * each.float()[..., None]).mT


def test_parameters_that_are_transposes_of_what_is_stored() -> None:
    layer, plain = made_of_floats()
    weight: Any = layer.weight
    assert weight.shape == (EXPERTS, INPUTS, OUTPUTS)
    assert torch.equal(weight + 0, plain)
    assert torch.equal(weight.transpose(1, 2)[1] + 0, plain[1].t())
    x = torch.randn(5, INPUTS, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(layer(x), x @ (plain[0] + plain[2]), rtol=1e-4, atol=1e-4)
    x = x.round(decimals=1)
    offsets = torch.tensor([2, 2, 5], dtype=torch.int32)
    grouped = torch._grouped_mm(x.bfloat16(), weight, offs=offsets).float()
    expected = torch.cat([x[:2] @ plain[0], x[2:] @ plain[2]])
    assert (grouped - expected).norm() < 0.02 * expected.norm()
    let_go(layer, "weight")
    assert type(layer) is Transposed
    assert [(name, tensor.shape, tensor.dtype) for name, tensor in layer.named_parameters()] == [
        ("weight", plain.shape, torch.float32)
    ]


def test_training_multiplies_plainly_and_modules_say_how_they_do_otherwise() -> None:
    layer, plain = made_of_floats()
    assert paths_of(layer) == {"bfloat16": "decode", "float16": "decode", "float32": "rounded"}
    assert layer.path == "its own"
    assert paths_of(nn.Linear(2, 2)) is None
    x = torch.randn(5, INPUTS, generator=torch.Generator().manual_seed(1))
    of_training = x @ (plain[0] + plain[2])
    of_evaluation = x.round(decimals=1) @ (plain[0] + plain[2])
    assert not torch.allclose(of_training, of_evaluation, rtol=1e-2, atol=1e-2)
    for mode, expected in ((True, of_training), (False, of_evaluation)):
        assert torch.allclose(layer.train(mode)(x), expected, rtol=1e-4, atol=1e-4)


def pickled(module: Any) -> Any:
    return pickle.loads(pickle.dumps(module))


def converted(module: Any) -> Any:
    return copy.deepcopy(module).to(torch.float64).to(torch.float32)


@pytest.mark.parametrize("action", [copy.copy, copy.deepcopy, pickled, converted])
@pytest.mark.parametrize(
    ("codes", "scales"), [(torch.float8_e4m3fn, torch.float8_e8m0fnu), (torch.float8_e5m2, torch.float8_e4m3fn)]
)
def test_what_is_held_survives_what_is_done_to_modules(
    codes: torch.dtype, scales: torch.dtype, action: Callable[[Any], Any]
) -> None:
    """Python can't pickle torch's 8-bit floats."""
    layer, _ = made_of_floats(codes, scales)
    x = torch.randn(5, INPUTS, generator=torch.Generator().manual_seed(1))
    expected = layer(x)
    other = action(layer)
    assert other.activation is None  # the class's own say in it
    assert isinstance(other._parameters["weight"], nn.Parameter)
    for module in (layer, other):
        assert type(module) is type(layer)
        assert [tensor.dtype for tensor in module.state_dict().values()] == [codes, scales]
        assert torch.equal(module(x), expected)


def test_biases_are_added_in_the_dtype_of_the_product() -> None:
    layer, plain = made_of_floats()
    weight: Any = layer.weight
    generator = torch.Generator().manual_seed(1)
    x, bias = torch.randn(5, INPUTS, generator=generator), torch.randn(OUTPUTS, generator=generator)
    expected = nn.functional.linear(x, plain[1].t(), bias)
    found = nn.functional.linear(x, weight.transpose(1, 2)[1], bias)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = nn.functional.linear(x, weight.transpose(1, 2)[1], bias)
    assert found.dtype == torch.bfloat16
    assert (found - expected).norm() < 0.02 * expected.norm()


def pieces(*places: Any, **fields: Any) -> Assembly:
    found = tuple(Piece(source=f"{n}.weight", into=place, **fields) for n, place in enumerate(places))
    return Assembly(shape=(2, OUTPUTS, INPUTS), pieces=found)


def parameter(*shape: int, name: str = "layer.weight") -> Parameter:
    return Parameter(name=name, spec=TensorSpec(dtype=torch.float32, shape=shape), module_type=Layer)


def test_which_layer_is_whose() -> None:
    halves = (slice(0, 3), slice(3, 6))
    cut = pieces(*[(expert, half) for half in halves for expert in (0, 1)])
    found = Experts.of(parameter(2, OUTPUTS, INPUTS), cut)
    assert found is not None
    assert found.names == (("0.weight", "2.weight"), ("1.weight", "3.weight"))
    assert (found.shape, found.whole, found.parts) == ((3, INPUTS), (2, OUTPUTS, INPUTS), 2)
    whole = Experts.of(parameter(2, OUTPUTS, INPUTS), pieces((0,), (1,)))
    assert whole is not None
    assert whole.modules == ["0", "1"]


@pytest.mark.parametrize(
    "assembly",
    [
        None,
        pieces((0,)),
        pieces((0, slice(0, 2)), (0, slice(2, 6)), (1, slice(0, 2)), (1, slice(2, 6))),
        pieces((slice(0, 1),), (slice(1, 2),)),
        pieces((0,), (1,), permute=(1, 0)),
        pieces((0, slice(None), slice(0, 8)), (1, slice(None), slice(0, 8))),
        Assembly(
            shape=(2, OUTPUTS, INPUTS), pieces=(Piece(source="0.bias", into=(0,)), Piece(source="1.b", into=(1,)))
        ),
    ],
)
def test_what_is_no_row_of_linear_layers(assembly: Assembly | None) -> None:
    assert Experts.of(parameter(2, OUTPUTS, INPUTS), assembly) is None


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Layer(), Layer()
        self.second.weight = nn.Parameter(torch.randn(EXPERTS, INPUTS, OUTPUTS))

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.as_tensor(self.second(self.first(hidden)))


def block_of(module: nn.Module) -> CalibrationBlock:
    shapes = {"second": (INPUTS, OUTPUTS), "first": (OUTPUTS, INPUTS)}
    found = [parameter(EXPERTS, *shape, name=f"block.{name}.weight") for name, shape in shapes.items()]
    hidden = [torch.randn(1, tokens, INPUTS) for tokens in (4, 7)]
    kind: Any = SimpleNamespace(run=lambda block, value: block(value))
    calls: list[Call] = [kind, kind]
    return CalibrationBlock(
        name="block", module=module, parameters={one.name: one for one in found}, hidden=hidden, calls=calls
    )


def test_blocks_show_what_experts_are_fed() -> None:
    with torch.no_grad():
        module = Block()
        block = block_of(module)
        order = [[one.name for one in group] for group in block.groups()]
        assert order == [["block.first.weight"], ["block.second.weight"]]
        seen: dict[str, dict[int, list[Tensor]]] = {name: {} for name in block.parameters}
        block.observe_experts(
            {
                name: lambda expert, rows, found=found: found.setdefault(expert, []).append(rows)
                for name, found in seen.items()
            }
        )
        for name, given in (
            ("block.first.weight", block.hidden),
            ("block.second.weight", [module.first(hidden) for hidden in block.hidden]),
        ):
            assert seen[name].keys() == {0, 2}
            for rows in seen[name].values():
                expected = [hidden.reshape(-1, hidden.shape[-1]) for hidden in given]
                assert [tensor.shape for tensor in rows] == [tensor.shape for tensor in expected]
                assert all(torch.allclose(*pair) for pair in zip(rows, expected, strict=True))
        assert isinstance(module.first.weight, nn.Parameter)
        assert "weight" not in module.first.__dict__


def test_modules_that_use_all_experts_at_once_show_nothing() -> None:
    class Whole(Block):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden * self.first.weight.sum()

    block = block_of(Whole())
    with pytest.raises(CalibrationError, match=r"weight: its module does something else than multiply with one expert"):
        block.groups()
    assert isinstance(block.module.get_submodule("first").weight, nn.Parameter)
