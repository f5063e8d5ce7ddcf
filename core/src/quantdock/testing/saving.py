"""Round trips: what is saved loads again bit for bit, and what is damaged doesn't load at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from quantdock import saving
from quantdock.errors import LedgerError, LoadError
from quantdock.quantizer import QuantizationConfig
from quantdock.reporting import report
from quantdock.tensors import qualified
from quantdock.testing.suite import Suite, different, logits, quantizer_of, values_of


class Saving(Suite):
    """Tests of saved checkpoints; skipped for a method that doesn't save or load."""

    def test_saved_model_loads_bit_for_bit(
        self, tmp_path: Path, config: QuantizationConfig, dtype: torch.dtype
    ) -> None:
        """Saving and loading gives the same tensors, the same logits and the same predicted bytes.

        When it fails: does ``components`` give back exactly what ``install`` was given? Does ``layout`` (or
        ``stored_layout``) declare for a stored parameter what it declares for one that is quantized on load? Is
        everything that ``forward`` needs either a component or in the config?
        """
        self.write(tmp_path / "checkpoint", dtype=dtype)
        made, saved = self.saved(tmp_path / "checkpoint", config)
        loaded = self.load(saved, None)
        assert quantizer_of(loaded).prequantized
        assert quantizer_of(loaded).parameters.keys() == quantizer_of(made).parameters.keys()
        assert not different(values_of(made), values_of(loaded)), "other tensors after a round trip"
        assert torch.equal(logits(made), logits(loaded)), "other logits after a round trip"
        assert report(loaded).predicted_nbytes == report(made).predicted_nbytes
        assert report(loaded).measured_nbytes == report(loaded).predicted_nbytes

    def test_saving_again_changes_nothing(self, folder: Path, config: QuantizationConfig) -> None:
        """A saved model that is loaded and saved again gives the same files.

        When it fails: compare ``config.json`` first; a field that ``saved_config`` fills in has to be kept as it is
        when it is there already.
        """
        _, saved = self.saved(folder, config)
        again = saving.save(self.load(saved, None), folder.with_name("again"))
        names = sorted(path.name for path in saved.iterdir())
        assert names == sorted(path.name for path in again.iterdir())
        assert json.loads((saved / "config.json").read_text()) == json.loads((again / "config.json").read_text())
        assert not different(_stored(saved), _stored(again))

    def test_saved_config_names_the_method(self, folder: Path, config: QuantizationConfig) -> None:
        """The saved ``config.json`` has a ``quantization_config`` that says which method reads it.

        When it fails: ``saved_config`` returns the whole JSON object, ``quant_method`` included.
        """
        _, saved = self.saved(folder, config)
        written = json.loads((saved / "config.json").read_text(encoding="utf-8"))["quantization_config"]
        assert written["quant_method"] == self.method
        type(config).from_dict(written)

    def test_missing_component_is_named(self, folder: Path, config: QuantizationConfig) -> None:
        """A saved checkpoint that lacks one stored tensor of a parameter is an error that names it.

        When it fails: ``companions`` lists every component but the parameter's own, and ``layout`` declares them all.
        """
        _, saved = self.saved(folder, config)
        name, parts = self._some_parameter(saved)
        state = _stored(saved)
        for part in parts:
            lacking = {stored: tensor for stored, tensor in state.items() if stored != part}
            self._refuses(_damaged(saved, lacking), f"no {part!r}", name, part)

    def test_unexpected_component_is_named(self, folder: Path, config: QuantizationConfig) -> None:
        """A companion beside a parameter that the method doesn't quantize is an error that names it.

        When it fails: ``stored_layout`` has to refuse components that aren't part of the format, and ``refusal``
        decides for stored parameters too.
        """
        _, saved = self.saved(folder, config)
        name, parts = self._some_parameter(saved)
        companions = [part for part in parts if part != name]
        if not companions:
            pytest.skip("a parameter of this format is one stored tensor")
        module, state = name.rpartition(".")[0], _stored(saved)
        for part in companions:
            stranger = f"norm.{part.removeprefix(f'{module}.')}"
            crowded = state | {stranger: state[part].clone()}
            self._refuses(_damaged(saved, crowded), f"a {stranger!r}", "norm.weight", stranger)

    def test_misshapen_component_is_named(self, folder: Path, config: QuantizationConfig) -> None:
        """A stored tensor of another shape than the format's is an error that names the parameter.

        When it fails: an own ``stored_layout`` has to check what it found; what it lets pass is handed to ``forward``.
        """
        _, saved = self.saved(folder, config)
        name, parts = self._some_parameter(saved)
        quantizer, state = quantizer_of(self.plan(saved, None)), _stored(saved)
        variable = quantizer.layout_of(quantizer.parameters[name]).variable
        for part in parts:
            if part.removeprefix(f"{name.rpartition('.')[0]}.") in variable:
                continue
            longer = torch.cat([state[part].reshape(-1), state[part].reshape(-1)[:1]])
            what = f"{part!r} of shape {list(longer.shape)} instead of {list(state[part].shape)}"
            self._refuses(_damaged(saved, state | {part: longer}), what, name, part)

    def _some_parameter(self, saved: Path) -> tuple[str, list[str]]:
        """A quantized parameter of a saved checkpoint, and the names that its components are stored under."""
        quantizer = quantizer_of(self.plan(saved, None))
        name, parameter = next(iter(quantizer.parameters.items()))
        names = [qualified(parameter.module, part) for part in quantizer.layout_of(parameter).components]
        return name, names

    def _refuses(self, folder: Path, what: str, *names: str) -> None:
        """Loading a damaged checkpoint is an error, in the plan or in its execution, that names one of ``names``."""
        refusal: Exception | None = None
        try:
            self.load(folder, None)
        except (LedgerError, LoadError) as error:
            refusal = error
        assert refusal is not None, f"a checkpoint with {what} can be loaded"
        assert any(name in str(refusal) for name in names), f"none of {names} is named in: {refusal}"


def _stored(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def _damaged(saved: Path, state: Mapping[str, torch.Tensor]) -> Path:
    """A copy of a saved checkpoint with other tensors."""
    from safetensors.torch import save_file

    folder = saved.with_name("damaged")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shutil.copy(saved / "config.json", folder)
    save_file(dict(state), folder / "model.safetensors", metadata={"format": "pt"})
    return folder
