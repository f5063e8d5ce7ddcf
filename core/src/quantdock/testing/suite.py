"""What a plugin's author tells the suite, and what all of its tests use."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from quantdock import calls, saving
from quantdock.discovery import PRESETS, QUANTIZERS, Catalog, Offer, installed
from quantdock.planning import Plan
from quantdock.policy import Policy
from quantdock.quantizer import QuantizationConfig, Quantizer
from quantdock.reporting import record_of
from quantdock.tensors import qualified
from quantdock.testing.model import SmallModel, example_ids, write_checkpoint

DTYPES = (torch.bfloat16, torch.float32)


class Suite:
    """The attributes to set; all but ``method`` have defaults, and one of ``configs`` and ``presets`` is needed."""

    method: ClassVar[str]
    """The quantizer's entry point, which is its ``quant_method``."""
    presets: ClassVar[Sequence[str]] = ()
    """Entry points of its presets."""
    configs: ClassVar[Sequence[QuantizationConfig]] = ()
    """What to load with; the presets, when there are none."""
    unsaved: ClassVar[Mapping[str, Any]] = {}
    """Fields of all ``configs`` that ``to_dict`` leaves out and a load needs, JSON-ready: calibration data, such as
    ``{"dataset": [{"ids": [[1, 2, 3]]}]}`` for the small model, whose only input is called ``ids``."""
    min_sqnr_db: ClassVar[float] = 15.0
    """Signal to quantization noise of each weight, in decibels, that the method must reach for normal values. Without
    ``capabilities.dequantize``: of the model's output."""
    features: ClassVar[int] = 64
    """Width of the model; every linear layer is ``[2 * features, features]`` or the reverse."""
    unsupported_shape: ClassVar[tuple[int, int] | None] = None
    """``[in, out]`` of a linear layer that the method can't quantize."""
    unsupported_device: ClassVar[str | None] = None
    """A device that the method doesn't run on; this machine need not have it."""
    device: ClassVar[str | None] = None
    """Where to load the model; where the method wants to be, by default."""
    heavy_modules: ClassVar[Sequence[str]] = ()
    """Modules that quantizing needs and that naming the method or a preset must not import."""

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run what takes a ``config`` for each, and what takes a ``dtype`` for both."""
        if "config" in metafunc.fixturenames:
            configs: list[QuantizationConfig | str] = [*self.configs] or [*self.presets]
            if not configs:
                raise pytest.UsageError(
                    f"{type(self).__name__} sets neither configs nor presets, so there is nothing to test"
                )
            names = [str(item) if isinstance(item, str) else f"config{index}" for index, item in enumerate(configs)]
            metafunc.parametrize("config", configs, ids=names, indirect=True)
        if "dtype" in metafunc.fixturenames:
            metafunc.parametrize("dtype", DTYPES, ids=[str(dtype).removeprefix("torch.") for dtype in DTYPES])

    @pytest.fixture
    def config(self, request: pytest.FixtureRequest) -> QuantizationConfig:
        """One of ``configs``, or what a preset names."""
        asked = request.param
        return asked if isinstance(asked, QuantizationConfig) else self.preset(asked)

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """A checkpoint of the small model, in bfloat16."""
        self.write(tmp_path / "checkpoint")
        return tmp_path / "checkpoint"

    # What is installed --------------------------------------------------------------------------------------------

    def offer(self, group: str, name: str) -> Offer:
        """An entry point, read from metadata."""
        found = Catalog(installed(), Policy()).find(group, name)
        assert found is not None, f"no installed distribution has an entry point {name!r} in the group {group!r}"
        return found

    def preset(self, name: str) -> QuantizationConfig:
        """The config that a preset's entry point names."""
        config = self.offer(PRESETS, name).load()
        assert isinstance(config, QuantizationConfig), f"preset {name!r} is {config!r}, expected a QuantizationConfig"
        return config

    def quantizer_class(self) -> type[Quantizer[Any]]:
        """The class that the method's entry point names."""
        found = self.offer(QUANTIZERS, self.method).load()
        assert isinstance(found, type), f"{found!r} is no class"
        assert issubclass(found, Quantizer), f"{found!r} is no subclass of Quantizer"
        return found

    # Loads --------------------------------------------------------------------------------------------------------

    def write(self, folder: Path, **options: Any) -> SmallModel:
        """A checkpoint as wide as ``features`` says (see ``write_checkpoint``)."""
        return write_checkpoint(folder, **{"features": self.features} | options)

    def plan(self, folder: Path, config: object, **options: Any) -> Plan:
        """A plan to load the small model, quantized as ``config`` says; the test is skipped when the method can't."""
        if config is not None:
            self.needs_quantizing()
        fixed: dict[str, Any] = {"model": SmallModel, "workers": 1, "device_map": self.device}
        return calls.plan(folder, quantize=config, **fixed | options)

    def needs_quantizing(self) -> None:
        """Skip the test when the method doesn't quantize on load."""
        if not self.quantizer_class().capabilities.quantize:
            pytest.skip(f"{self.method} doesn't claim to quantize while loading")

    def load(self, folder: Path, config: object, **options: Any) -> torch.nn.Module:
        """The small model, quantized as ``config`` says."""
        return self.plan(folder, config, **options).execute()

    def saved(self, folder: Path, config: object) -> tuple[torch.nn.Module, Path]:
        """``folder`` loaded quantized, and where it was saved; the test is skipped when the method can't."""
        can = self.quantizer_class().capabilities
        if not (can.save and can.load):
            pytest.skip(f"{self.method} doesn't claim to save and to load what was saved")
        model = self.load(folder, config)
        return model, saving.save(model, folder.with_name(f"{folder.name}-saved"))


def quantizer_of(loaded: torch.nn.Module | Plan) -> Quantizer[Any]:
    """The one quantizer of a model or a plan; it has at least one parameter."""
    selection = loaded.selection if isinstance(loaded, Plan) else record_of(loaded).selection
    (chosen,) = selection
    assert chosen.quantizer.parameters, (
        "the quantizer took no parameter of the small model. Does refusal() return None for parameters whose role is "
        "'linear'?"
    )
    return chosen.quantizer


def components_of(model: torch.nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    """The components of every quantized parameter."""
    quantizer = quantizer_of(model)
    return {name: dict(quantizer.components(model, slot)) for name, slot in quantizer.parameters.items()}


def values_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Everything that a model is made of: its state dict, with quantized parameters as their components."""
    parts = {
        qualified(name.rpartition(".")[0], part): tensor
        for name, tensors in components_of(model).items()
        for part, tensor in tensors.items()
    }
    owned = tuple(components_of(model))
    plain = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name not in owned and not name.startswith(tuple(f"{one}." for one in owned))
    }
    return plain | parts


def bits_of(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor's values, in order, whatever its dtype."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def different(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of tensors that only one of two has, or that differ in dtype, shape or one bit."""
    return sorted(
        name
        for name in one.keys() | other.keys()
        if name not in one
        or name not in other
        or (one[name].dtype, one[name].shape) != (other[name].dtype, other[name].shape)
        or bits_of(one[name]) != bits_of(other[name])
    )


def digest(model: torch.nn.Module) -> str:
    """A hash of every name, dtype, shape and bit of a model."""
    result = hashlib.sha256()
    for name, tensor in sorted(values_of(model).items()):
        result.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode() + bits_of(tensor))
    return result.hexdigest()


def logits(model: torch.nn.Module) -> torch.Tensor:
    """What the small model makes of its example input."""
    device = next(model.parameters()).device
    with torch.no_grad():
        return torch.as_tensor(model(example_ids().to(device))).cpu()


def sqnr_db(reference: torch.Tensor, found: torch.Tensor) -> float:
    """Signal to noise of ``found``, in decibels."""
    signal = reference.detach().cpu().double()
    noise = (signal - found.detach().cpu().double()).square().sum().item()
    return math.inf if noise == 0 else 10 * math.log10(signal.square().sum().item() / noise)
