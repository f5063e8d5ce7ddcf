"""What is stored: a description in the header that has to fit, and tensors that are mapped and not copied."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import quantdock
from quantdock import LedgerError, Parameter, TensorSpec, UnsupportedError
from quantdock.testing import SmallModel, write_checkpoint
from quantdock_torchao import tensors, upstream

NAME = "blocks.0.up.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model in int8 with quantized activations, as quantdock saves it."""
    folder = tmp_path_factory.mktemp("saved")
    write_checkpoint(folder / "source")
    model = quantdock.load(folder / "source", model=SmallModel, quantize="torchao-int8-dynamic")
    return quantdock.save(model, folder / "saved")


def read(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata())  # noqa: SIM118


def damaged(saved: Path, folder: Path, state: dict[str, torch.Tensor], metadata: dict[str, str]) -> Path:
    folder.mkdir()
    shutil.copy(saved / "config.json", folder)
    save_file(state, folder / "model.safetensors", metadata=metadata)
    return folder


def test_the_files_are_torchaos(saved: Path) -> None:
    """torchao's own reader takes them, and its writer writes the same."""
    support = upstream.module("torchao.prototype.safetensors.safetensors_support")
    utils = upstream.module("torchao.prototype.safetensors.safetensors_utils")
    state, metadata = read(saved)
    assert utils.is_metadata_torchao(metadata)
    found, left = support.unflatten_tensor_state_dict(state, metadata)
    assert left.keys() == {"steps"}  # torchao can't name what belongs to no module
    flat, described = support.flatten_tensor_state_dict(found)
    assert flat.keys() | left.keys() == state.keys()
    assert {name: metadata[name] for name in found} == {name: described[name] for name in found}
    model = quantdock.load(saved, model=SmallModel)
    assert type(model.get_parameter(NAME)) is type(found[NAME])


def test_what_is_stored_is_mapped(saved: Path) -> None:
    """Not one component is a copy: each lies where the file is mapped."""
    model = quantdock.load(saved, model=SmallModel)
    weights = [name for name in model.state_dict() if name.endswith(("up.weight", "down.weight"))]
    mapped = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(saved / "model.safetensors")):
            start, end = (int(text, 16) for text in line.split()[0].split("-"))
            mapped.append(range(start, end))
    for name in weights:
        for part in tensors.parts_of("weight", model.get_parameter(name)).values():
            assert any(part.data_ptr() in addresses for addresses in mapped), f"{name} is a copy"
    assert len(weights) == 4


@pytest.mark.parametrize("preset", ["torchao-int8", "torchao-int8-dynamic", "torchao-float8"])
def test_weights_may_lie_anywhere_in_a_file(preset: str, tmp_path: Path) -> None:
    """Some of torch's kernels kill the process when 8-bit values in a mapped file aren't aligned; not torchao's."""
    write_checkpoint(tmp_path / "source")
    ours = quantdock.load(tmp_path / "source", model=SmallModel, quantize=preset)
    folder = quantdock.save(ours, tmp_path / "saved")
    state, metadata = read(folder)
    pad = {"a": torch.zeros(1, dtype=state["blocks.0.up._weight_qdata"].dtype)}  # the writer sorts by dtype, then name
    again = quantdock.load(
        damaged(folder, tmp_path / "shifted", state | pad, metadata), model=SmallModel, ignore_unexpected=["a"]
    )
    assert any(part.data_ptr() % 2 for part in tensors.parts_of("weight", again.get_parameter(NAME)).values())
    for count in (1, 7, 16):
        ids = torch.arange(count)[None]
        with torch.no_grad():
            assert torch.equal(again(ids), ours(ids))


def test_a_model_without_descriptions_is_refused(saved: Path, tmp_path: Path) -> None:
    state, _ = read(saved)
    folder = damaged(saved, tmp_path / "bare", state, {"format": "pt"})
    with pytest.raises(LedgerError, match=r"doesn't describe 'blocks\.0\.up\.weight'"):
        quantdock.load(folder, model=SmallModel)


@pytest.mark.parametrize("part", ["qdata", "scale", "zero_point"])
def test_missing_and_misshapen_parts_are_named(saved: Path, tmp_path: Path, part: str) -> None:
    state, metadata = read(saved)
    name = f"blocks.0.up._weight_{part}"
    value = state.pop(name)
    folder = damaged(saved, tmp_path / "missing", state, metadata)
    with pytest.raises(LedgerError, match=f"component '_weight_{part}' is missing"):
        quantdock.load(folder, model=SmallModel)
    for index, other in enumerate((value.flatten(), torch.cat([value, value]), value.to(torch.int32))):
        folder = damaged(saved, tmp_path / str(index), state | {name: other}, metadata)
        with pytest.raises(LedgerError, match=rf"blocks\.0\.up\.weight.*_weight_{part}|description"):
            quantdock.load(folder, model=SmallModel)


PARAMETER = Parameter(
    name="a.weight", spec=TensorSpec(dtype=torch.bfloat16, shape=(8, 16)), module_type=nn.Linear, role="linear"
)


def example() -> tuple[dict[str, Any], dict[str, TensorSpec]]:
    linear = nn.Linear(16, 8, bias=False, dtype=torch.bfloat16, device="meta")
    ao = upstream.module("torchao.quantization")
    ao.quantize_(linear, ao.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    made = tensors.described("weight", linear.weight)
    return json.loads(made.description), dict(made.components)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(_type="Int4OpaqueTensor"), "says _type='Int4OpaqueTensor'; what can be loaded is"),
        (lambda data: data.update(_type="Float8Tensor"), "can't be used"),
        (lambda data: data.update(_tensor_data_names="qdata"), "says _tensor_data_names='qdata'"),
        (lambda data: data["_tensor_data_names"].append("other"), "component '_weight_other' is missing"),
        (lambda data: data["_data"].update(block_size=[1, 32]), r"blocks of \[1, 32\] don't divide \[8, 16\]"),
        (
            lambda data: data["_data"].update(block_size=[1, 8]),
            r"'_weight_scale' is float32\[8, 1\], expected shape \[8, 2\]",
        ),
        (lambda data: data["_data"].update(block_size=[0, 16]), "block_size is"),
        (lambda data: data["_data"].update(block_size=None), "block_size is None"),
        (lambda data: data["_data"].update(other=1), "can't be used"),
        (lambda data: data["_data"].pop("dtype"), "can't be used"),
        (lambda data: data["_data"]["dtype"].update(_data="load"), "can't be used"),
        (lambda data: data["_data"]["act_quant_kwargs"].update(_type="os"), "can't be used"),
        (
            lambda data: data["_data"]["act_quant_kwargs"]["_data"].update(mapping_type="SYMMETRIC"),
            "doesn't compute with it",
        ),
    ],
)
def test_descriptions_that_do_not_fit_are_refused(change: Callable[[dict[str, Any]], None], message: str) -> None:
    data, found = example()
    tensors.read(PARAMETER, json.dumps(data), found)
    change(data)
    with pytest.raises(UnsupportedError, match=message):
        tensors.read(PARAMETER, json.dumps(data), found)


@pytest.mark.parametrize("text", ["", "{", "[]", "1", '"a"', "{}", "[" * 100_000, '{"_type": 1, "_data": {}, "x": 1}'])
def test_what_is_no_description_is_refused(text: str) -> None:
    _, found = example()
    with pytest.raises(UnsupportedError, match=r"a\.weight: its description"):
        tensors.read(PARAMETER, text, found)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from(["torch.dtype", "MappingType"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["_type", "_data", "a"]), inner),
    max_leaves=6,
)


@given(key=st.sampled_from(["block_size", "dtype", "act_quant_kwargs", "reduce_range", "new"]), value=JSON)
@settings(deadline=None)
def test_any_description_is_read_or_refused(key: str, value: object) -> None:
    data, found = example()
    data["_data"][key] = value
    try:
        made = tensors.read(PARAMETER, json.dumps(data), found)
    except UnsupportedError:
        return
    assert made.components == found
    assert json.loads(made.description) == data


def test_another_dtype_than_the_stored_one_is_refused() -> None:
    data, found = example()
    parameter = dataclasses.replace(PARAMETER, spec=TensorSpec(dtype=torch.float32, shape=(8, 16)))
    with pytest.raises(UnsupportedError, match=r"stored to be used in torch.bfloat16, .* pass dtype='bfloat16'"):
        tensors.read(parameter, json.dumps(data), found)
