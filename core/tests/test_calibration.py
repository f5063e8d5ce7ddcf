"""Calibration in the core: which blocks, with what, in which order, and what a quantizer is held to."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import quantdock
from quantdock import (
    Blocks,
    Calibration,
    CalibrationBlock,
    CalibrationError,
    ConfigError,
    Parameter,
    PluginError,
    TensorSpec,
)
from quantdock.calibration.capturing import capture
from quantdock.calibration.data import make_batches
from quantdock.testing import installed_plugin

EXAMPLE = Path(__file__).parents[2] / "tests" / "toy_plugin" / "quantdock_toy.py"
TOY = """
from __future__ import annotations
from dataclasses import dataclass, field
from typing import Any, ClassVar
from quantdock import Calibration
from quantdock_toy import ToyConfig, ToyQuantizer, quantize

@dataclass(frozen=True, kw_only=True)
class CarefulConfig(ToyConfig):
    quant_method: ClassVar[str] = "careful"
    dataset: Any = field(default=None, compare=False, repr=False)
    does: Any = field(default=None, compare=False, repr=False)

class CarefulQuantizer(ToyQuantizer):
    config_class = CarefulConfig
    def calibration(self):
        return None if self.config.dataset is None else Calibration(dataset=self.config.dataset)
    def calibrate(self, block):
        if self.config.does is not None:
            yield from self.config.does(self, block)
            return
        for parameter in block.parameters.values():
            yield parameter, components(block.weight(parameter))

def components(weight):
    weight, scale = quantize(weight)
    return {"weight": weight, "weight_scale": scale}
"""


class Part(nn.Module):
    """Two layers that are fed the same, and one behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.left, self.right, self.out = nn.Linear(16, 32), nn.Linear(16, 32, bias=False), nn.Linear(32, 16)

    def forward(self, hidden_states: torch.Tensor, mask: torch.Tensor, options: dict[str, float]) -> torch.Tensor:
        x = self.norm(hidden_states)
        x = self.out(torch.relu(self.left(x)) * self.right(x.clone() if options["copied"] else x))
        return hidden_states + options["scale"] * x * mask[..., None]


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(24, 16)
        self.parts = nn.ModuleList(Part() for _ in range(3))
        self.copied = 0.0

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.embed(input_ids)
        for index, part in enumerate(self.parts):
            mask = torch.ones(input_ids.shape) * (index + 1)
            hidden = part(hidden, mask=mask, options={"scale": 0.5, "copied": self.copied})
        return hidden


SAMPLES = [[1, 2, 3, 4], [5, 6, 7], [8, 9, 10, 11]]
NAMES = [f"parts.{part}.{leaf}.weight" for part in range(3) for leaf in ("left", "right", "out")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_file(Whole().state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.fixture
def toy(tmp_path: Path) -> Iterator[Any]:
    entry_points = {"quantdock.quantizers": {"careful": "careful:CarefulQuantizer"}}
    modules = {"careful": TOY}
    if not _installed():
        modules["quantdock_toy"] = EXAMPLE.read_text(encoding="utf-8")
    with installed_plugin(tmp_path, dist="careful", entry_points=entry_points, modules=modules):
        import careful

        yield careful


def _installed() -> bool:
    import importlib.util

    return importlib.util.find_spec("quantdock_toy") is not None


def load(folder: Path, toy: Any, does: Any = None, **options: Any) -> nn.Module:
    config = toy.CarefulConfig(dataset=SAMPLES, does=does)
    return quantdock.load(folder, model=Whole, quantize=config, **options)


# The flow -------------------------------------------------------------------------------------------------------------


def test_each_block_is_fed_by_the_quantized_ones_before_it(folder: Path, toy: Any) -> None:
    seen: list[tuple[str, list[torch.Tensor], list[torch.Tensor]]] = []

    def does(quantizer: Any, block: CalibrationBlock) -> Any:
        hidden = [tensor.clone() for tensor in block.hidden]
        for parameter in block.parameters.values():
            yield parameter, toy.components(block.weight(parameter))
        seen.append((block.name, hidden, [block.forward(batch) for batch in range(block.batches)]))

    model = load(folder, toy, does)
    assert [name for name, _, _ in seen] == ["parts.0", "parts.1", "parts.2"]
    for one, two in itertools.pairwise(seen):
        assert all(torch.equal(made, fed) for made, fed in zip(one[2], two[1], strict=True))
    ids = [torch.tensor([sample]) for sample in SAMPLES]
    with torch.no_grad():
        assert all(torch.equal(embedded, model.embed(one)) for embedded, one in zip(seen[0][1], ids, strict=True))
        assert all(torch.equal(made, model(one)) for made, one in zip(seen[2][2], ids, strict=True))


def test_the_result_is_that_of_quantizing_without_data(folder: Path, toy: Any, tmp_path: Path) -> None:
    """This toy looks at nothing; weights pass through full precision, biases along with them."""
    model = load(folder, toy)
    plain = quantdock.load(folder, model=Whole, quantize=toy.CarefulConfig())
    state = plain.state_dict()
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert type(model.get_submodule("parts.1.out")) is type(plain.get_submodule("parts.1.out"))
    report = quantdock.report(model)
    assert report.predicted_nbytes == report.measured_nbytes
    assert {entry.parameter for entry in report.ledger.entries if entry.action == "quantize"} == set(NAMES)
    assert not model.training


def test_progress_ends_where_it_should(folder: Path, toy: Any) -> None:
    told: list[Any] = []
    load(folder, toy, progress=told.append)
    assert (told[-1].stored_nbytes, told[-1].parameters) == (told[-1].total_nbytes, told[-1].total_parameters)
    assert told[-1].total_parameters == len(Whole().state_dict())


def test_what_a_block_shows(folder: Path, toy: Any) -> None:
    batches: dict[str, int] = {}
    groups: dict[str, list[list[str]]] = {}
    fed: dict[str, list[torch.Tensor]] = {"left": [], "out": []}

    def does(quantizer: Any, block: CalibrationBlock) -> Any:
        batches[block.name] = block.batches
        assert block.rows == 11
        groups[block.name] = [[parameter.name[8:] for parameter in group] for group in block.groups()]
        hidden = [tensor.clone() for tensor in block.hidden]
        if block.name == "parts.1":
            block.observe({path: rows.append for path, rows in fed.items()})
            assert all(torch.equal(one, other) for one, other in zip(hidden, block.hidden, strict=True))
            with torch.no_grad():
                expected = block.module.norm(hidden[1]).view(-1, 16)
            assert torch.equal(fed["left"][1], expected)
        assert not block.module._forward_pre_hooks
        for parameter in block.parameters.values():
            assert block.owner(parameter) is block.module.get_submodule(block.path(parameter))
            yield parameter, toy.components(block.weight(parameter))

    load(folder, toy, does)
    assert set(batches.values()) == {3}
    assert set(map(str, groups.values())) == {"[['left.weight', 'right.weight'], ['out.weight']]"}
    assert [rows.shape for rows in fed["out"]] == [(4, 32), (3, 32), (4, 32)]


def test_what_follows_the_last_watched_module_is_not_computed(folder: Path, toy: Any) -> None:
    calls: list[str] = []

    def does(quantizer: Any, block: CalibrationBlock) -> Any:
        block.groups()
        handle = block.module.get_submodule("out").register_forward_hook(lambda *_: calls.append(block.name))
        block.observe({"left": lambda rows: None, "right": lambda rows: None})
        handle.remove()
        assert not calls
        for parameter in block.parameters.values():
            yield parameter, toy.components(block.weight(parameter))

    load(folder, toy, does)


def test_parts_that_are_not_quantized_can_be_written(folder: Path, toy: Any) -> None:
    def does(quantizer: Any, block: CalibrationBlock) -> Any:
        norm = block.module.get_submodule("norm")
        block.write("norm.weight", norm.weight / 2)
        block.write("left.bias", block.module.get_submodule("left").bias + 1)
        for parameter in block.parameters.values():
            if block.path(parameter) != "out":
                block.write(f"{block.path(parameter)}.weight", block.weight(parameter) * 2)
            yield parameter, toy.components(block.weight(parameter))
        with pytest.raises(CalibrationError, match=r"norm\.weight is float32\[16\], and was to become float16\[16\]"):
            block.write("norm.weight", norm.weight.half())

    model, plain = load(folder, toy, does), quantdock.load(folder, model=Whole)
    assert torch.equal(model.get_parameter("parts.2.norm.weight"), plain.get_parameter("parts.2.norm.weight") / 2)
    assert torch.equal(model.get_parameter("parts.2.left.bias"), plain.get_parameter("parts.2.left.bias") + 1)
    expected = toy.components(plain.get_parameter("parts.2.right.weight").detach() * 2)
    assert torch.equal(model.get_submodule("parts.2.right").weight, expected["weight"])


def test_a_module_that_is_fed_a_copy_is_a_group_of_its_own() -> None:
    torch.manual_seed(0)
    model = Whole().eval()
    parameters = {
        name: Parameter(name=name, spec=TensorSpec.of(model.get_parameter(name)), module_type=nn.Linear, role="linear")
        for name in NAMES[:3]
    }
    for copied, expected in ((0.0, [2, 1]), (1.0, [1, 1, 1])):
        model.copied = copied
        captured = capture(model, Blocks.of(model), [{"input_ids": torch.tensor([[1, 2]])}], torch.device("cpu"))
        block = CalibrationBlock(
            name="parts.0",
            module=model.parts[0],
            parameters=parameters,
            hidden=captured.hidden,
            calls=captured.calls["parts.0"],
        )
        with torch.no_grad():
            assert [len(group) for group in block.same_input()] == expected


# What quantizers are held to ------------------------------------------------------------------------------------------


def _left_out(quantizer: Any, block: CalibrationBlock) -> Any:
    first, *_ = block.parameters.values()
    import careful

    yield first, careful.components(block.weight(first))


def _twice(quantizer: Any, block: CalibrationBlock) -> Any:
    yield from _left_out(quantizer, block)
    yield from _left_out(quantizer, block)


def _something_else(quantizer: Any, block: CalibrationBlock) -> Any:
    first, *_ = block.parameters.values()
    yield first, {"weight": block.weight(first)}


def _fails(quantizer: Any, block: CalibrationBlock) -> Any:
    block.observe({"left": lambda rows: rows @ rows})
    yield


def _gives_up(quantizer: Any, block: CalibrationBlock) -> Any:
    raise CalibrationError("no good", parameter="parts.0.left.weight")
    yield


@pytest.mark.parametrize(
    ("does", "expected", "message"),
    [
        (_left_out, PluginError, r"calibrate left out parts\.0\.out\.weight, parts\.0\.right\.weight"),
        (_twice, PluginError, r"calibrate yields 'parts\.0\.left\.weight', which isn't its own or was there before"),
        (_something_else, PluginError, r"CarefulQuantizer made weight: float32\[32, 16\] .* its layout declares"),
        (
            _fails,
            CalibrationError,
            r"calibration with careful \(careful 1\.0\) stopped: RuntimeError: .*\n.*block: parts\.0",
        ),
        (_gives_up, CalibrationError, r"no good\n  parameter: parts\.0\.left\.weight\n  block: parts\.0"),
    ],
)
def test_a_quantizer_that_breaks_its_word(
    does: Any, expected: type[Exception], message: str, folder: Path, toy: Any
) -> None:
    with pytest.raises(expected, match=f"(?s){message}"):
        load(folder, toy, does)


# Blocks and data ------------------------------------------------------------------------------------------------------


def test_the_blocks_of_a_model() -> None:
    model = nn.ModuleDict({"vision": nn.ModuleList(nn.Linear(2, 2) for _ in range(8)), "text": Whole()})
    assert Blocks.of(model).paths == ["text.parts.0", "text.parts.1", "text.parts.2"]
    nested = nn.ModuleList(
        nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(4, 4) for _ in range(9))}) for _ in range(2)
    )
    assert Blocks.of(nn.ModuleDict({"layers": nested})).paths == ["layers.0", "layers.1"]
    assert Blocks.of(nn.Linear(2, 2)).paths == ()


def test_equal_arguments_of_blocks_are_kept_once() -> None:
    model = Whole().eval()
    batches = [{"input_ids": torch.tensor([[token, 2, 3]])} for token in range(5)]
    captured = capture(model, Blocks.of(model), batches, torch.device("cpu"))
    assert captured.shared_nbytes == 3 * 3 * 4  # a mask for each block, whatever the batch
    assert captured.nbytes - captured.shared_nbytes == 5 * 3 * 16 * 4
    assert "forward" not in vars(model.parts[0])


class Odd(Whole):
    """Runs its blocks in another order."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.embed(input_ids)
        for part in reversed(self.parts):
            hidden = part(hidden, mask=None, options={})
        return hidden


class Short(Whole):
    """Doesn't run its last block."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.parts[0](self.embed(input_ids), mask=None, options={})  # type: ignore[no-any-return]


class Stateful(Whole):
    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.parts[0](self.embed(input_ids), mask=None, options=self)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Odd, r"calls its block parts\.2 where parts\.0 was expected"),
        (Short, r"called 1 of its 3 blocks"),
        (Stateful, r"parts\.0 is called with an object of the class Stateful"),
    ],
)
def test_models_that_are_no_row_of_blocks(model: type[Whole], message: str) -> None:
    made = model()
    with pytest.raises(CalibrationError, match=message):
        capture(made, Blocks.of(made), [{"input_ids": torch.tensor([[1, 2]])}], torch.device("cpu"))
    assert "forward" not in vars(made.parts[0])


def batches_of(samples: list[Any], size: int) -> list[list[list[int]]]:
    from quantdock import Architecture

    made = make_batches(Calibration(dataset=samples, batch_size=size), Architecture(), Blocks(paths=()), None)  # type: ignore[arg-type]
    return [inputs["input_ids"].tolist() for inputs in made.inputs]


def test_samples_of_equal_length_share_a_batch() -> None:
    assert batches_of([[1, 2], [3], [4, 5], [6, 7]], 2) == [[[1, 2], [4, 5]], [[3]], [[6, 7]]]
    assert batches_of([[1, 2], torch.tensor([[3, 4], [5, 6]]), [7, 8]], 4) == [[[1, 2], [7, 8]], [[3, 4], [5, 6]]]


def test_texts_without_a_tokenizer(folder: Path, toy: Any) -> None:
    config = toy.CarefulConfig(dataset=["some text"])
    with pytest.raises(quantdock.UnsupportedError, match="has no tokenizer for texts; pass token ids"):
        quantdock.plan(folder, model=Whole, quantize=config)


def test_a_model_without_blocks(tmp_path: Path, toy: Any) -> None:
    save_file({"0.weight": torch.ones(4, 4), "0.bias": torch.ones(4)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    config = toy.CarefulConfig(dataset=SAMPLES)
    with pytest.raises(CalibrationError, match="Sequential has no list of blocks that run one after another"):
        quantdock.plan(tmp_path, model=lambda: nn.Sequential(nn.Linear(4, 4)), quantize=config)


def test_several_devices_are_refused(folder: Path, toy: Any, tmp_path: Path) -> None:
    config = toy.CarefulConfig(dataset=SAMPLES)
    where: Mapping[str, Any] = {"embed": "disk", "parts": "cpu"}
    with pytest.raises(
        CalibrationError, match="device_map puts the model on cpu, disk, and calibration runs on one device"
    ):
        quantdock.plan(folder, model=Whole, quantize=config, device_map=where, offload_dir=tmp_path / "off")


def test_names_of_data_sets_are_refused() -> None:
    with pytest.raises(ConfigError, match="'c4' is the name of a data set, and nothing is downloaded"):
        Calibration(dataset="c4")
