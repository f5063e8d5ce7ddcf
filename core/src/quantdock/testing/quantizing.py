"""What happens to one tensor: quantized without harm to it, within the bytes that were declared, and close to it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantdock import saving
from quantdock.layout import Slices
from quantdock.quantizer import QuantizationConfig, Quantizer
from quantdock.tensors import Parameter, TensorSpec
from quantdock.testing.memory import PeakBytes, expired, weak
from quantdock.testing.model import EXTRA, SmallModel
from quantdock.testing.suite import Suite, bits_of, components_of, different, logits, quantizer_of, sqnr_db

SLACK = 64 << 10
FORWARD_DB = 20.0
"""How close a layer's own arithmetic comes to that of its dequantized weight; quantized activations are allowed for."""


class Quantizing(Suite):
    """Tests of ``quantize_param`` and ``dequantize``."""

    def test_quantize_param_leaves_its_input_alone(
        self, tmp_path: Path, config: QuantizationConfig, dtype: torch.dtype
    ) -> None:
        """``quantize_param`` neither writes to the tensor it is given nor keeps it, in the result or elsewhere.

        When it fails: the tensor may be a view of the mapped file. Work on a copy where you write in place
        (``tensor.float()`` is no copy of a float32 tensor), and keep no tensor in ``self``.
        """
        quantizer, parameter, device = self._quantizer(tmp_path, config, dtype)
        tensor = _normal(parameter, device)
        before = bits_of(tensor)
        result = _quantized(quantizer, parameter, tensor)
        assert bits_of(tensor) == before, "the input was written to"
        shared = [
            name for name, part in result.items() if part.untyped_storage()._cdata == tensor.untyped_storage()._cdata
        ]
        assert not shared, f"components are views of the input: {', '.join(shared)}"
        storage = weak(tensor.untyped_storage())
        del tensor
        assert expired(storage), "the input was kept: something still refers to it"

    def test_working_bytes_are_enough(self, tmp_path: Path, config: QuantizationConfig, dtype: torch.dtype) -> None:
        """``quantize_param`` needs no more memory than ``working_bytes`` says (10 % and 64 KiB are let pass).

        When it fails: the memory budget of a load relies on this number. Count what is alive at the worst moment
        beside input and result, or do the work in slices.
        """
        quantizer, parameter, device = self._quantizer(tmp_path, config, dtype, widened=8)
        tensor = _normal(parameter, device)
        declared = quantizer.layout(parameter).working_bytes
        with PeakBytes([tensor]) as measure:
            result = _quantized(quantizer, parameter, tensor)
        needed = measure.peak - sum(part.nbytes for part in result.values())
        assert needed <= 1.1 * declared + SLACK, f"{needed} bytes needed for {parameter.spec}, {declared} declared"

    def test_slices_change_nothing(self, tmp_path: Path, config: QuantizationConfig, dtype: torch.dtype) -> None:
        """With ``slices`` in its layout, a parameter that is quantized in slices, in any order and however it is cut,
        has the bits of one that is quantized as a whole; and the slices are left alone.

        When it fails: the index that ``quantize_slice`` is given is the first row's, along ``slices.dim``. Does a
        slice's place in the components follow from it, and is everything that spans slices left to ``finish_slices``?
        """
        quantizer, parameter, device = self._quantizer(tmp_path, config, dtype, widened=8)
        slices = quantizer.layout(parameter).slices
        if slices is None:
            pytest.skip(f"{self.method} quantizes parameters only as a whole")
        tensor = _normal(parameter, device)
        before, expected = bits_of(tensor), _quantized(quantizer, parameter, tensor)
        for count in (1, 3):
            parts = quantizer.begin_slices(parameter, device)
            for start, part in _cut(tensor, slices, count):
                quantizer.quantize_slice(parameter, part, start, parts)
            found = quantizer.finish_slices(parameter, parts)
            assert not different(expected, found), f"{', '.join(different(expected, found))} differ"
        assert bits_of(tensor) == before, "the input was written to"

    def test_working_bytes_of_slices_are_enough(
        self, tmp_path: Path, config: QuantizationConfig, dtype: torch.dtype
    ) -> None:
        """Quantizing in slices needs no more memory than ``slices`` says (10 % and 64 KiB are let pass).

        When it fails: count what is alive in ``quantize_slice`` beside the slice and the parts, and in
        ``begin_slices`` and ``finish_slices`` beside the components.
        """
        quantizer, parameter, device = self._quantizer(tmp_path, config, dtype, widened=8)
        slices = quantizer.layout(parameter).slices
        if slices is None:
            pytest.skip(f"{self.method} quantizes parameters only as a whole")
        tensor = _normal(parameter, device)
        with torch.no_grad(), PeakBytes([tensor]) as whole:
            parts = quantizer.begin_slices(parameter, device)
            held = whole.peak
            for start, part in _cut(tensor, slices, 3):
                with PeakBytes([tensor, *parts.values()]) as one:
                    quantizer.quantize_slice(parameter, part, start, parts)
                allowed = slices.working_bytes + slices.working_copies * part.nbytes
                assert one.peak <= 1.1 * allowed + SLACK, f"{one.peak} bytes needed for a slice, {allowed} declared"
        with torch.no_grad(), PeakBytes([tensor, *parts.values()]) as last:
            result = quantizer.finish_slices(parameter, parts)
        needed = held + last.peak - sum(part.nbytes for part in result.values())
        allowed = slices.held_bytes
        assert needed <= 1.1 * allowed + SLACK, f"{needed} bytes needed beside the components, {allowed} declared"

    def test_quantized_weights_are_close(self, tmp_path: Path, config: QuantizationConfig, dtype: torch.dtype) -> None:
        """Every weight is as close to the original as ``min_sqnr_db`` asks.

        When it fails: print which ones are off. All: is the scale right, are codes rounded and not cut off? Some: what
        is special about their shape? bfloat16 only: is the scale computed in float32?
        """
        original = self.write(tmp_path, dtype=dtype)
        model = self.load(tmp_path, config)
        quantizer = quantizer_of(model)
        if not quantizer.capabilities.dequantize:
            assert sqnr_db(logits(original), logits(model)) >= self.min_sqnr_db
            return
        for name, components in components_of(model).items():
            found = quantizer.dequantize(components, quantizer.parameters[name])
            assert TensorSpec.of(found) == quantizer.parameters[name].spec, f"{name!r} comes back as another tensor"
            quality = sqnr_db(original.get_parameter(name), found)
            assert quality >= self.min_sqnr_db, f"{name!r}: {quality:.1f} dB"

    def test_dequantized_model_is_the_same_model(
        self, tmp_path: Path, config: QuantizationConfig, dtype: torch.dtype
    ) -> None:
        """``quantdock.dequantize`` gives back the original modules, and they compute what the quantized ones did.

        When it fails: ``restore_module`` makes the original class on meta; and the quantized module's ``forward`` has
        to use the weight that ``dequantize`` gives, and the bias.
        """
        self.write(tmp_path, dtype=dtype)
        model = self.load(tmp_path, config)
        if not quantizer_of(model).capabilities.dequantize:
            pytest.skip(f"{self.method} doesn't claim to dequantize")
        quantized = logits(model)
        restored = saving.dequantize(model)
        with torch.device("meta"):
            before = dict(SmallModel({"features": self.features, "dtype": "float32"}).named_modules())
        for name, module in restored.named_modules():
            assert type(module) is type(before[name]), f"{name!r} came back as {type(module).__name__}"
        assert {tensor.dtype for tensor in restored.parameters()} == {dtype}
        assert sqnr_db(logits(restored), quantized) >= FORWARD_DB

    def _quantizer(
        self, folder: Path, config: QuantizationConfig, dtype: torch.dtype, widened: int = 1
    ) -> tuple[Quantizer[QuantizationConfig], Parameter, torch.device]:
        """A quantizer, a parameter that it took, ``widened`` in both dimensions, and where the plan puts that."""
        self.write(folder, dtype=dtype, linear=(widened * self.features, 2 * widened * self.features))
        plan = self.plan(folder, config)
        quantizer = quantizer_of(plan)
        parameter = quantizer.parameters.get(f"{EXTRA}.weight")
        assert parameter is not None, f"the linear layer {EXTRA!r} isn't quantized"
        return quantizer, parameter, torch.device(plan.placement.device_of(parameter.name))


def _cut(tensor: torch.Tensor, slices: Slices, count: int) -> list[tuple[int, torch.Tensor]]:
    """First rows and views of at least ``count`` slices, if there are so many, the last one first."""
    size = tensor.shape[slices.dim]
    rows = max(1, size // count // slices.multiple) * slices.multiple
    starts = range(0, size, rows)
    return [(start, tensor.narrow(slices.dim, start, min(rows, size - start))) for start in reversed(starts)]


def _normal(parameter: Parameter, device: torch.device) -> torch.Tensor:
    values = torch.randn(parameter.spec.shape, generator=torch.Generator().manual_seed(0))
    return values.to(device=device, dtype=parameter.spec.dtype)


def _quantized(
    quantizer: Quantizer[QuantizationConfig], parameter: Parameter, tensor: torch.Tensor
) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        result = quantizer.quantize_param(parameter, tensor)
    assert result is not None, f"quantize_param returned None for {parameter.name!r}, which the quantizer had taken"
    return dict(result)
