"""A model that was used, moved, copied or pickled is the model that was loaded."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
from torch import nn

import quantdock
from quantdock.testing import SmallModel, write_checkpoint
from quantdock_torchao import tensors

PRESETS = ["torchao-int8", "torchao-int8-dynamic", "torchao-float8"]
IDS = torch.arange(24).reshape(2, 12)


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    result = {}
    for name, value in model.state_dict().items():
        parts = tensors.parts_of("weight", value) if hasattr(value, "tensor_data_names") else {"": value}
        result |= {f"{name} {part}": tensor.view(torch.uint8) for part, tensor in parts.items() if tensor.dim()}
    return result


def assert_same(one: nn.Module, other: nn.Module) -> None:
    left, right = values(one), values(other)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    with torch.no_grad():
        assert torch.equal(one(IDS), other(IDS))


@pytest.fixture(params=PRESETS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "source")
    model = quantdock.load(tmp_path / "source", model=SmallModel, quantize=request.param)
    return quantdock.save(model, tmp_path / "saved")


def test_after_use_it_is_still_the_same(folder: Path) -> None:
    fresh, model = (quantdock.load(folder, model=SmallModel) for _ in range(2))
    with torch.no_grad():
        model(IDS)
    assert_same(model, fresh)
    assert_same(copy.deepcopy(model), fresh)
    buffer = io.BytesIO()  # and not pickle itself, which can't read torch's 8-bit floats back
    torch.save(model, buffer)
    buffer.seek(0)
    assert_same(torch.load(buffer, weights_only=False), fresh)
    assert_same(model.to("cpu"), fresh)
    assert quantdock.report(model).measured_nbytes == quantdock.report(model).predicted_nbytes
    again = quantdock.load(quantdock.save(model, folder.with_name("again")), model=SmallModel)
    assert_same(again, fresh)


def test_a_state_dict_goes_into_another_model(folder: Path) -> None:
    model, other = (quantdock.load(folder, model=SmallModel) for _ in range(2))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    for name in ("blocks.0.up.weight", "blocks.1.up.weight"):
        other.get_parameter(name).qdata.zero_()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert_same(other, model)


def test_memory_is_what_was_announced(folder: Path) -> None:
    model = quantdock.load(folder, model=SmallModel)
    report = quantdock.report(model)
    held = {tensor.data_ptr(): tensor.nbytes for tensor in values(model).values() if tensor.nbytes}
    assert report.predicted_nbytes - sum(held.values()) == sum(
        buffer.nbytes for name, buffer in model.named_buffers() if name in ("steps", "positions")
    )
