"""Files that are damaged, incomplete or somebody else's: an error that names the parameter and says what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import quantdock
from quantdock import ConfigError, LedgerError
from quantdock.testing import SmallModel, write_checkpoint

NAME = "blocks.0.up.weight"
CLASSES = {"torchao-int8": "Int8Tensor", "torchao-int8-dynamic": "Int8Tensor", "torchao-float8": "Float8Tensor"}
PARTS = [
    (preset, part)
    for preset in CLASSES
    for part in ("qdata", "scale", "zero_point")
    if (preset, part) != ("torchao-float8", "zero_point")
]
AGAIN = "fetch or save the files again, or quantize the original weights"

State = dict[str, torch.Tensor]
Headers = dict[str, str]


class Saved:
    """A model saved by quantdock, of which damaged copies are made."""

    def __init__(self, root: Path, preset: str) -> None:
        self._root, self._count = root, 0
        write_checkpoint(root / "source")
        model = quantdock.load(root / "source", model=SmallModel, quantize=preset)
        self._folder = quantdock.save(model, root / "saved")

    def damaged(
        self,
        tensors: Callable[[State], object] | None = None,
        headers: Callable[[Headers], object] | None = None,
        config: Callable[[dict[str, Any]], object] | None = None,
    ) -> Path:
        """A folder in which the functions have changed the tensors, the header's texts and the config."""
        self._count += 1
        folder = Path(shutil.copytree(self._folder, self._root / f"copy-{self._count}"))
        with safe_open(folder / "model.safetensors", "pt") as file:
            state = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            texts = dict(file.metadata())
        if tensors is not None:
            tensors(state)
        if headers is not None:
            headers(texts)
        save_file(state, folder / "model.safetensors", metadata=texts)
        if config is not None:
            data = json.loads((folder / "config.json").read_text())
            config(data["quantization_config"])
            (folder / "config.json").write_text(json.dumps(data))
        return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Saved]:
    made: dict[str, Saved] = {}

    def of(preset: str) -> Saved:
        if preset not in made:
            made[preset] = Saved(tmp_path_factory.mktemp(preset), preset)
        return made[preset]

    return of


def refused(folder: Path, *messages: str) -> None:
    """The load stops before it has begun, with one problem, which says all of this."""
    with pytest.raises(LedgerError) as error:
        quantdock.load(folder, model=SmallModel)
    assert len(error.value.problems) == 1
    for message in messages:
        assert message in error.value.problems[0]


@pytest.mark.parametrize("preset", CLASSES)
def test_what_is_not_damaged_loads(preset: str, saved: Callable[[str], Saved]) -> None:
    """The copies themselves do no harm."""
    model = quantdock.load(saved(preset).damaged(), model=SmallModel)
    assert type(model.get_parameter(NAME)).__name__ == CLASSES[preset]


@pytest.mark.parametrize(("preset", "part"), PARTS)
def test_a_missing_part(preset: str, part: str, saved: Callable[[str], Saved]) -> None:
    folder = saved(preset).damaged(lambda state: state.pop(f"blocks.0.up._weight_{part}"))
    refused(folder, f"{NAME}: its description", f"component '_weight_{part}' is missing; {AGAIN}")


@pytest.mark.parametrize(
    "change",
    [
        torch.flatten,
        lambda value: value[:-1],
        lambda value: torch.cat([value, value], dim=1),
        lambda value: value[:, :0],
        lambda value: value[None],
    ],
    ids=["flat", "short", "wide", "empty", "rank"],
)
@pytest.mark.parametrize(("preset", "part"), PARTS)
def test_a_part_of_another_shape(
    preset: str, part: str, change: Callable[[torch.Tensor], torch.Tensor], saved: Callable[[str], Saved]
) -> None:
    name = f"blocks.0.up._weight_{part}"
    folder = saved(preset).damaged(lambda state: state.update({name: change(state[name]).contiguous()}))
    refused(folder, NAME, AGAIN)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float64, torch.uint8, torch.bool])
@pytest.mark.parametrize(("preset", "part"), PARTS)
def test_a_part_of_another_dtype(preset: str, part: str, dtype: torch.dtype, saved: Callable[[str], Saved]) -> None:
    name = f"blocks.0.up._weight_{part}"
    folder = saved(preset).damaged(lambda state: state.update({name: state[name].to(dtype)}))
    found = str(dtype).removeprefix("torch.")
    refused(folder, f"{NAME}: component '_weight_{part}' is {found}[", "expected shape [", AGAIN)


@pytest.mark.parametrize(
    ("preset", "dtype", "expected"),
    [
        ("torchao-int8", torch.float8_e4m3fn, "one of int8;"),
        ("torchao-int8-dynamic", torch.float8_e4m3fn, "one of int8;"),
        ("torchao-float8", torch.int8, "one of float8_e4m3fn, float8_e5m2;"),
    ],
)
def test_codes_of_another_class(preset: str, dtype: torch.dtype, expected: str, saved: Callable[[str], Saved]) -> None:
    """torchao makes such a tensor; it fails in the forward, or is wrong."""
    name = "blocks.0.up._weight_qdata"
    folder = saved(preset).damaged(lambda state: state.update({name: state[name].to(dtype)}))
    refused(folder, f"{NAME}: component '_weight_qdata' is", expected)


def test_a_part_of_a_module_that_is_not_there(saved: Callable[[str], Saved]) -> None:
    folder = saved("torchao-int8").damaged(lambda state: state.update({"blocks.7.up._weight_scale": torch.ones(8, 1)}))
    refused(folder, "stored tensor 'blocks.7.up._weight_scale' has no parameter in the model", "ignore_unexpected")


def test_a_part_of_a_weight_that_is_not_quantized(saved: Callable[[str], Saved]) -> None:
    folder = saved("torchao-int8").damaged(
        lambda state: state.update({"blocks.0.norm._weight_scale": torch.ones(8, 1)})
    )
    refused(folder, "'blocks.0.norm.weight' is stored quantized (weight, _weight_scale)", "its description", AGAIN)


def test_a_weight_beside_its_parts(saved: Callable[[str], Saved]) -> None:
    def add(state: State) -> None:
        state[NAME] = state["blocks.0.up._weight_qdata"].to(torch.bfloat16)

    refused(saved("torchao-int8").damaged(add), f"{NAME}: its description", "component 'weight' is not part of it")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (lambda text: text[: len(text) // 2], "is no JSON"),
        (lambda text: "\x01" + text, "is no JSON"),
        (lambda text: "", "is no JSON"),
        (lambda text: "[" * 100_000, "is no JSON"),
        (lambda text: "[]", "is [], expected an object with _data, _tensor_data_names, _type"),
        (lambda text: '{"_type": "Tensor"}', "expected an object with _data, _tensor_data_names, _type"),
        (lambda text: text.replace("block_size", "block"), "can't be used"),
        (lambda text: text.replace('"block_size": [1', '"block_size": [3'), "blocks of [3"),
        (lambda text: text.replace('"block_size": [1', '"block_size": [NaN'), "block_size is [nan"),
    ],
    ids=["truncated", "garbled", "empty", "deep", "list", "plain", "field", "block", "number"],
)
@pytest.mark.parametrize("preset", CLASSES)
def test_a_description_that_can_not_be_read(
    preset: str, text: Callable[[str], str], message: str, saved: Callable[[str], Saved]
) -> None:
    folder = saved(preset).damaged(headers=lambda found: found.update({NAME: text(found[NAME])}))
    refused(folder, NAME, message, AGAIN)


@pytest.mark.parametrize("kind", ["NoSuchTensor", "Int4Tensor", "Tensor", "os"])
def test_a_description_of_a_class_that_is_not_known(kind: str, saved: Callable[[str], Saved]) -> None:
    def rename(found: Headers) -> None:
        found[NAME] = json.dumps(json.loads(found[NAME]) | {"_type": kind})

    folder = saved("torchao-int8").damaged(headers=rename)
    refused(folder, f"{NAME}: its description in the file's metadata says _type={kind!r}; what can be loaded is Int8")


def test_no_description_at_all(saved: Callable[[str], Saved]) -> None:
    folder = saved("torchao-int8").damaged(headers=lambda found: found.pop(NAME))
    refused(folder, f"the metadata of the weight files doesn't describe '{NAME}'")


def test_the_description_of_another_class(saved: Callable[[str], Saved]) -> None:
    """One that would fit the names of the parts."""

    def swap(found: Headers) -> None:
        data = json.loads(found[NAME])
        found[NAME] = json.dumps(data | {"_type": "IntxUnpackedToInt8Tensor"})

    refused(saved("torchao-int8").damaged(headers=swap), f"{NAME}: its description", "can't be used", AGAIN)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.pop("quant_type"), "quant_type is missing from the quantization_config"),
        (lambda config: config.update(quant_type="int8wo"), "quant_type is 'int8wo', expected"),
        (lambda config: config["quant_type"]["default"].update(_type="Nope"), "no class of data 'Nope'"),
        (lambda config: config["quant_type"]["default"].update(_data=None), "_data of Int8WeightOnlyConfig is None"),
        (lambda config: config["quant_type"]["default"].update(_version="x"), "has version 'x'"),
        (lambda config: config["quant_type"].pop("default"), "quant_type is {}, expected"),
        (lambda config: config.update(no_such_field=1), "no field 'no_such_field'"),
    ],
)
def test_a_config_that_can_not_be_read(
    change: Callable[[dict[str, Any]], object], message: str, saved: Callable[[str], Saved]
) -> None:
    with pytest.raises(ConfigError, match=message):
        quantdock.load(saved("torchao-int8").damaged(config=change), model=SmallModel)
