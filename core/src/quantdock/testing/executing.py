"""What a load gives: the bytes that were announced, the same bits each time, and nothing left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from quantdock.quantizer import QuantizationConfig
from quantdock.reporting import report
from quantdock.tensors import TensorSpec
from quantdock.testing.plugins import in_new_process
from quantdock.testing.suite import Suite, components_of, different, digest, logits, quantizer_of, values_of

SEED = 7
"""Of a checkpoint that no other test loads."""


class Executing(Suite):
    """Tests of whole loads."""

    seen_alone: ClassVar[dict[str, dict[str, Any]]]
    """Loads in processes of their own, by config: a new process costs seconds."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.seen_alone = {}

    def test_declared_bytes_are_measured_bytes(
        self, tmp_path: Path, config: QuantizationConfig, dtype: torch.dtype
    ) -> None:
        """Each parameter's components are what its layout declares, and the model holds the bytes that were predicted.

        When it fails: compare the two numbers of the message. More measured than predicted: does a module keep a
        tensor that isn't a component (then it belongs into ``resident`` or ``shared_nbytes``)? Users size their
        machines by the prediction.
        """
        self.write(tmp_path, dtype=dtype)
        model = self.load(tmp_path, config)
        quantizer = quantizer_of(model)
        for name, components in components_of(model).items():
            layout = quantizer.layout(quantizer.parameters[name])
            found = {part: TensorSpec.of(tensor) for part, tensor in components.items()}
            assert layout.fits(found), f"{name!r} is {found}, its layout declares {dict(layout.components)}"
            if layout.resident is None and not layout.variable:
                assert layout.nbytes == sum(tensor.nbytes for tensor in components.values())
        assert report(model).predicted_nbytes == report(model).measured_nbytes, "predicted isn't measured"

    def test_two_loads_are_equal(self, folder: Path, config: QuantizationConfig) -> None:
        """Loading twice gives the same bits and the same logits.

        When it fails: is memory used that was never written (``torch.empty``), or a random number without a seed?
        """
        one, other = self.load(folder, config), self.load(folder, config)
        assert not different(values_of(one), values_of(other))
        assert torch.equal(logits(one), logits(other))

    def test_loads_share_no_state(self, tmp_path: Path, config: QuantizationConfig) -> None:
        """Two loads that overlap, of different checkpoints, give what each gives alone in a new process.

        When it fails: something outlives a load or is seen by another: a class attribute, a module global, a cache
        keyed by a parameter's name. Keep state in the instance, which serves one load, or nowhere.
        """
        self.write(tmp_path / "this", seed=SEED)
        self.write(tmp_path / "before", seed=SEED + 1)
        self.write(tmp_path / "beside", seed=SEED + 2, dtype=torch.float32)
        self.load(tmp_path / "before", config)
        this, beside = (self.plan(tmp_path / name, config) for name in ("this", "beside"))
        beside.execute()
        found = digest(this.execute())
        assert found == self.alone(tmp_path, config)["digest"], "a load gives other bits beside another than alone"

    def test_workers_change_nothing(self, folder: Path, config: QuantizationConfig) -> None:
        """Four worker threads give the same bits as one.

        When it fails: ``quantize_param`` runs for several parameters at once. Keep what it works on in local
        variables, and hold a lock around a library that can't be called from two threads.
        """
        one, four = self.load(folder, config, workers=1), self.load(folder, config, workers=4)
        assert not different(values_of(one), values_of(four))

    def test_load_leaves_no_trace(self, tmp_path: Path, config: QuantizationConfig) -> None:
        """A load changes no global setting, no environment variable and no class of torch's.

        When it fails: pass what you need as arguments, and subclass instead of patching.
        """
        changed = self.alone(tmp_path, config)["changed"]
        assert not changed, f"changed for everybody: {', '.join(changed)}"

    def test_gradients_flow(self, folder: Path, config: QuantizationConfig) -> None:
        """With ``capabilities.train``, gradients pass through quantized layers, so adapters can be trained.

        When it fails: does ``forward`` run under ``no_grad``, or detach its input?
        """
        model = self.load(folder, config)
        if not quantizer_of(model).capabilities.train:
            pytest.skip(f"{self.method} doesn't claim that adapters can be trained")
        embedding = model.get_parameter("embed.weight")
        for parameter in quantizer_of(model).parameters.values():
            x = torch.ones(4, parameter.spec.shape[-1], device=embedding.device, dtype=embedding.dtype)
            parameter.owner(model)(x.requires_grad_()).sum().backward()
            assert x.grad is not None, f"no gradient came through {parameter.module!r}"
            assert x.grad.any(), f"the gradient through {parameter.module!r} is zero"

    def test_compiles_in_one_graph(self, folder: Path, config: QuantizationConfig) -> None:
        """With ``capabilities.compile``, the model survives ``torch.compile`` without graph breaks.

        When it fails: run with ``TORCH_LOGS=graph_breaks``. Branches on values and calls past torch break graphs.
        """
        model = self.load(folder, config)
        if not quantizer_of(model).capabilities.compile:
            pytest.skip(f"{self.method} doesn't claim to compile")
        expected = logits(model)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert isinstance(compiled, torch.nn.Module)
        assert torch.equal(logits(compiled), expected)

    def alone(self, tmp_path: Path, config: QuantizationConfig) -> dict[str, Any]:
        """What comes of a load in a new process; one is enough for each config, since they are the same by contract."""
        self.needs_quantizing()
        asked = json.dumps({**config.to_dict(), **self.unsaved})
        if asked not in self.seen_alone:
            self.write(tmp_path / "alone", seed=SEED)
            printed = in_new_process("-m", "quantdock.testing.alone", str(tmp_path / "alone"), asked, self.device or "")
            self.seen_alone[asked] = json.loads(printed)
        return self.seen_alone[asked]
