"""Use, move, copy, pickle and save, in any order: a quantized model stays what it was, to the bit.

Backends rearrange weights for the processor in the first forward; what is saved or moved afterwards has to be what was
stored all the same. Every preset that is installed takes part.
"""

from __future__ import annotations

import copy
import io
import tempfile
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from tests.conftest import skipping_what_this_machine_lacks
from torch import Tensor, nn

import quantdock
from quantdock.testing import SmallModel, write_checkpoint
from quantdock.testing.suite import different, values_of

PRESETS = sorted(quantdock.presets())
FEATURES = 256
"""Wide enough for every group and block, so that each backend takes its fast path."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder, features=FEATURES)
    return folder


def _load(folder: Path, quantize: str | None) -> nn.Module:
    return quantdock.load(folder, quantize=quantize, model=SmallModel, device_map="cpu")


def _logits(model: nn.Module, tokens: int) -> Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(torch.arange(tokens).reshape(1, tokens) * 5 % 32))


class AnyOrder(RuleBasedStateMachine):
    """A model in use; subclasses say of which preset."""

    folder: ClassVar[Path]
    preset: ClassVar[str]
    values: ClassVar[dict[str, Tensor]]
    one: ClassVar[Tensor]
    many: ClassVar[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.model = _load(self.folder, self.preset)

    @rule()
    def forward_of_one_token(self) -> None:
        assert torch.equal(_logits(self.model, 1), self.one)

    @rule()
    def forward_of_many_tokens(self) -> None:
        assert torch.equal(_logits(self.model, 12), self.many)

    @rule()
    def forward_in_training(self) -> None:
        self.model.train()
        self.model(torch.arange(4).reshape(1, 4)).sum().backward()
        self.model.zero_grad()
        self.model.eval()

    @rule()
    def move(self) -> None:
        self.model = self.model.cpu()

    @rule()
    def move_elsewhere(self) -> None:
        """What ``to``, ``cuda`` and the like do with every tensor, with no other device at hand."""
        self.model = self.model._apply(torch.clone)  # type: ignore[no-untyped-call]

    @rule()
    def copy(self) -> None:
        self.model = copy.deepcopy(self.model)

    @rule()
    def pickle(self) -> None:
        buffer = io.BytesIO()
        torch.save(self.model, buffer)
        buffer.seek(0)
        self.model = torch.load(buffer, weights_only=False)

    @rule()
    def save_and_load(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            saved = quantdock.save(self.model, Path(folder) / "saved")
            self.model = _load(saved, None)
            _logits(self.model, 12)  # its file is gone afterwards, its pages aren't

    @invariant()
    def stays_what_it_was(self) -> None:
        assert not different(values_of(self.model), self.values)


@pytest.mark.parametrize("preset", PRESETS)
def test_in_any_order(preset: str, checkpoint: Path) -> None:
    with skipping_what_this_machine_lacks(preset):
        fresh = _load(checkpoint, preset)
    values = {name: tensor.clone() for name, tensor in values_of(fresh).items()}
    many = _logits(fresh, 12)
    one = _logits(_load(checkpoint, preset), 1)
    machine = type(
        "Machine",
        (AnyOrder,),
        {"folder": checkpoint, "preset": preset, "values": values, "one": one, "many": many},
    )
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=5,
            stateful_step_count=8,
            report_multiple_bugs=False,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        ),
    )
