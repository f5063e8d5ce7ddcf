"""Files that are damaged, incomplete or somebody else's: an error that names the parameter and says what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantdock
from quantdock import ConfigError, LedgerError, UnsupportedError
from quantdock.testing import SmallModel, write_checkpoint

NAME = "blocks.0.up.weight"
PRESETS = ["quanto-int8", "quanto-float8"]
PARTS = ["weight._data", "weight._scale", "input_scale", "output_scale"]
AGAIN = "fetch or save the files again, or quantize the original weights"

State = dict[str, torch.Tensor]
Damage = Callable[..., Path]


@pytest.fixture(scope="module", params=PRESETS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model as quantdock saves it."""
    root = tmp_path_factory.mktemp(request.param)
    write_checkpoint(root / "source")
    return quantdock.save(quantdock.load(root / "source", model=SmallModel, quantize=request.param), root / "saved")


@pytest.fixture
def damaged(saved: Path, tmp_path: Path) -> Damage:
    """``damaged(tensors, config)``: a copy in which the functions have changed the tensors and the config."""

    def make(
        tensors: Callable[[State], object] | None = None, config: Callable[[dict[str, Any]], object] | None = None
    ) -> Path:
        folder = Path(shutil.copytree(saved, tmp_path / "copy"))
        state = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
        if tensors is not None:
            tensors(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        if config is not None:
            data = json.loads((folder / "config.json").read_text())
            config(data["quantization_config"])
            (folder / "config.json").write_text(json.dumps(data))
        return folder

    return make


def refused(folder: Path, *messages: str) -> None:
    """The load stops before it has begun, with one problem, which says all of this."""
    with pytest.raises(LedgerError) as error:
        quantdock.load(folder, model=SmallModel)
    assert len(error.value.problems) == 1
    for message in messages:
        assert message in error.value.problems[0]


def test_what_is_not_damaged_loads(damaged: Damage) -> None:
    """The copies themselves do no harm."""
    quantdock.load(damaged(), model=SmallModel)


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_part(part: str, damaged: Damage) -> None:
    folder = damaged(lambda state: state.pop(f"blocks.0.up.{part}"))
    refused(folder, f"{NAME}: component {part!r} is missing", AGAIN)


@pytest.mark.parametrize(
    "change",
    [torch.flatten, lambda value: value[:-1], lambda value: torch.cat([value, value]), lambda value: value[None]],
    ids=["flat", "short", "long", "rank"],
)
@pytest.mark.parametrize("part", PARTS[:2])
def test_a_part_of_another_shape(part: str, change: Callable[[torch.Tensor], torch.Tensor], damaged: Damage) -> None:
    name = f"blocks.0.up.{part}"
    folder = damaged(lambda state: state.update({name: change(state[name]).contiguous()}))
    refused(folder, f"{NAME}: component {part!r} is ", ", expected ", AGAIN)


@pytest.mark.parametrize("part", PARTS[2:])
def test_a_scale_of_activations_that_is_no_scalar(part: str, damaged: Damage) -> None:
    folder = damaged(lambda state: state.update({f"blocks.0.up.{part}": torch.ones(2, dtype=torch.bfloat16)}))
    refused(folder, f"{NAME}: component {part!r} is bfloat16[2], expected bfloat16[]", AGAIN)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float64, torch.uint8])
@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_another_dtype(part: str, dtype: torch.dtype, damaged: Damage) -> None:
    name = f"blocks.0.up.{part}"
    folder = damaged(lambda state: state.update({name: state[name].to(dtype)}))
    found = str(dtype).removeprefix("torch.")
    refused(folder, f"{NAME}: component {part!r} is {found}[", ", expected ", AGAIN)


def test_codes_of_the_other_kind(damaged: Damage) -> None:
    """Each weight that the config contradicts is named."""

    def swap(config: dict[str, Any]) -> None:
        config["weights"] = "float8" if config["weights"] == "int8" else "int8"

    with pytest.raises(LedgerError, match=r"'weight\._data' is .*, expected .* says the config") as error:
        quantdock.load(damaged(config=swap), model=SmallModel)
    assert len(error.value.problems) == 4


def test_another_dtype_than_the_stored_one(damaged: Damage) -> None:
    folder = damaged()
    with pytest.raises(LedgerError, match=r"in torch\.bfloat16, .* loaded in torch\.float32; pass dtype='bfloat16'"):
        quantdock.load(folder, model=SmallModel, config_overrides={"dtype": "float32"})


def test_a_part_of_a_module_that_is_not_there(damaged: Damage) -> None:
    folder = damaged(lambda state: state.update({"blocks.7.up.weight._scale": torch.ones(8, 1)}))
    refused(folder, "stored tensor 'blocks.7.up.weight._scale' has no parameter in the model", "ignore_unexpected")


def test_a_part_of_a_weight_that_can_not_be_quantized(damaged: Damage) -> None:
    folder = damaged(lambda state: state.update({"blocks.0.norm.weight._scale": torch.ones(8, 1)}))
    refused(
        folder, "'blocks.0.norm.weight' is stored quantized", "in LayerNorm: quanto quantizes the weights of linear"
    )


def test_a_weight_beside_its_parts(damaged: Damage) -> None:
    folder = damaged(
        lambda state: state.update({NAME: torch.zeros(state[f"{NAME}._data"].shape, dtype=torch.bfloat16)})
    )
    refused(folder, f"{NAME}: component 'weight' is not part of the format", AGAIN)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weights": 8}, ConfigError, "weights is 8, expected one of 'int8'"),
        ({"weights": "int4"}, UnsupportedError, "weights='int4' can't be used: .* compiler .* Use weights='int8'"),
        ({"activations": "int8"}, UnsupportedError, "activations='int8': .* calibrating .* leave it out"),
        ({"no_such_field": 1}, ConfigError, "no field 'no_such_field'"),
    ],
)
def test_a_config_that_can_not_be_used(
    change: dict[str, Any], error: type[Exception], message: str, damaged: Damage
) -> None:
    folder = damaged(config=lambda config: config.update(change))
    with pytest.raises(error, match=message):
        quantdock.load(folder, model=SmallModel)
