"""What is decided before a weight is read: which parameters, which modules, what is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from quantdock.architecture import Skeleton
from quantdock.config import ModelConfig
from quantdock.defaults import PlainArchitecture
from quantdock.discovery import QUANTIZERS
from quantdock.errors import LedgerError, UnsupportedError
from quantdock.hookspecs import hookimpl
from quantdock.options import LoadOptions
from quantdock.quantizer import QuantizationConfig
from quantdock.reporting import report
from quantdock.testing.model import EXTRA, SmallModel
from quantdock.testing.suite import Suite, bits_of, quantizer_of

KEPT = "blocks.1.down.weight"


class Deciding(Suite):
    """Tests of plans, and of what they keep their word on."""

    def test_preprocess_touches_only_its_own(self, folder: Path, config: QuantizationConfig) -> None:
        """``preprocess_model`` swaps the modules of ``self.parameters`` and leaves every other one as it was, on meta.

        When it fails: go through ``self.parameters`` and not through ``model.modules()``, make new modules with
        ``device="meta"``, and add no hook or attribute to a module that isn't yours.
        """
        plan = self.plan(folder, config)
        mine = {parameter.module for parameter in quantizer_of(plan).parameters.values()}
        with torch.device("meta"):
            before = dict(SmallModel(plan.config.data).named_modules())
        after = dict(plan.skeleton.model.named_modules())
        for name, module in before.items():
            if not any(name == own or name.startswith(f"{own}.") for own in mine):
                assert name in after, f"module {name!r} is gone"
                assert _looks(after[name]) == _looks(module), f"module {name!r} was changed"
        new = [name for name in after if name not in before and not name.startswith(tuple(f"{own}." for own in mine))]
        assert not new, f"new modules outside of the quantizer's own: {new}"
        real = [name for name, tensor in plan.skeleton.model.named_parameters() if not tensor.is_meta]
        assert not real, f"off the meta device before loading: {real}"

    def test_skip_lists_hold(self, tmp_path: Path, config: QuantizationConfig) -> None:
        """What ``skip=``, ``quantize={pattern: None}`` or the architecture keeps is loaded as it is stored.

        When it fails: act on ``self.parameters`` alone; the core has taken out what is skipped.
        """
        keeping: list[tuple[str, object, dict[str, Any]]] = [
            ("blocks.0.up.weight", config, {"skip": ["blocks.0"]}),
            ("blocks.1.up.weight", {"blocks.1": None, "*": config}, {}),
            (KEPT, config, {"plugins": [_KeepsOne()]}),
        ]
        reference = self.write(tmp_path)
        for name, asked, options in keeping:
            model = self.load(tmp_path, asked, **options)
            assert name not in quantizer_of(model).parameters, f"{name!r} was to be left alone"
            stored = reference.get_parameter(name)
            assert bits_of(model.get_parameter(name)) == bits_of(stored), f"{name!r} has other values than stored"

    def test_every_parameter_is_accounted_for(self, folder: Path, config: QuantizationConfig) -> None:
        """Each parameter, those of rank 3 too, is quantized or has a reason in the coverage.

        When it fails: ``refusal`` returns a sentence for what the method leaves alone, and ``None`` for nothing else.
        """
        model = self.load(folder, config)
        quantizer = quantizer_of(model)
        for entry in report(model).ledger.entries:
            if entry.parameter in quantizer.parameters:
                assert entry.method, f"{entry.parameter!r} is the quantizer's, but the ledger doesn't say so"
            else:
                assert entry.note.strip(), f"{entry.parameter!r} is in full precision, and nothing says why"

    def test_tied_weights_stay_tied(self, folder: Path, config: QuantizationConfig) -> None:
        """A head that shares the embedding's tensor still does, and neither is quantized.

        When it fails: take nothing that isn't in ``self.parameters``; ties are the core's.
        """
        model = self.load(folder, config)
        assert model.get_parameter("head.weight") is model.get_parameter("embed.weight")
        assert {"head.weight", "embed.weight"}.isdisjoint(quantizer_of(model).parameters)

    def test_unfit_shape_is_an_error(self, tmp_path: Path, config: QuantizationConfig) -> None:
        """A linear layer whose shape the method can't take (``unsupported_shape``) is an error that names it.

        When it fails: ``layout`` raises ``UnsupportedError`` with the reason. A refusal would be a silent fallback:
        the user asked for this layer to be quantized.
        """
        if self.unsupported_shape is None:
            pytest.skip("unsupported_shape isn't set: the method takes any")
        self.write(tmp_path, linear=self.unsupported_shape)
        with pytest.raises(LedgerError, match=re.escape(f"{EXTRA}.weight")):
            self.plan(tmp_path, config)

    def test_unfit_device_is_an_error(self, folder: Path, config: QuantizationConfig) -> None:
        """A device that the method doesn't run on (``unsupported_device``) is an error that names it.

        When it fails: ``check_device`` raises ``UnsupportedError`` with the reason and what to do instead.
        """
        if self.unsupported_device is None:
            pytest.skip("unsupported_device isn't set: the method runs wherever torch does")
        with pytest.raises(UnsupportedError, match=self.unsupported_device):
            quantizer_of(self.plan(folder, config)).check_device(torch.device(self.unsupported_device))

    def test_report_names_the_plugin(self, folder: Path, config: QuantizationConfig) -> None:
        """The report says which distribution quantized what, and in which version.

        When it fails: the distribution's metadata lacks a version, or another one serves the method.
        """
        offer = self.offer(QUANTIZERS, self.method)
        model = self.load(folder, config)
        assert report(model).plugins.get(offer.dist) == offer.version
        by = {entry.by for entry in report(model).ledger.entries if entry.parameter in quantizer_of(model).parameters}
        assert by == {offer.dist}


class _KeepsOne:
    """A stage plugin whose architecture keeps one parameter in full precision."""

    @hookimpl
    def build_model(self, config: ModelConfig, options: LoadOptions) -> Skeleton:
        with torch.device("meta"):
            model = SmallModel(config.data)
        buffers = {"positions": SmallModel(config.data).get_buffer("positions")}
        architecture = _Keeps(model, config, buffers, options.settled_dtype)
        return Skeleton(model=model, architecture=architecture, built_by="the suite")


class _Keeps(PlainArchitecture):
    def kept(self) -> Mapping[str, str]:
        return {**super().kept(), KEPT: "kept by the architecture"}


def _looks(module: torch.nn.Module) -> dict[str, object]:
    """What makes a module what it is, as far as a quantizer might change it."""
    tensors = {**module._parameters, **module._buffers}
    plain = {name: value for name, value in vars(module).items() if not isinstance(value, dict | torch.Tensor)}
    return {
        "type": type(module),
        "tensors": {name: None if t is None else (t.dtype, t.shape, t.requires_grad) for name, t in tensors.items()},
        "attributes": plain,
        "hooks": len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks),
    }
