"""LLM.int8 as a format: what is stored, what is made of a tensor, and what goes into a model."""

from __future__ import annotations

from collections.abc import Mapping

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from quantdock import Layout, Parameter, Slices, TensorSpec, UnsupportedError
from quantdock_bnb import int8, states
from quantdock_bnb.formats import Format, require_components
from quantdock_bnb.modules import Linear8bitLt

_TRANSPOSING = 64 << 10
"""More than torch takes to copy a transposed matrix, tile by tile."""


class EightBit(Format):
    """LLM.int8: one scale per row. With ``llm_int8_has_fp16_weight`` the weight is stored as it is."""

    def companions(self) -> frozenset[str]:
        return frozenset() if self.config.llm_int8_has_fp16_weight else frozenset({"SCB", "weight_format"})

    def layout(self, parameter: Parameter) -> Layout:
        shape = states.stored_shape(parameter)
        if self.config.llm_int8_has_fp16_weight:
            specs = {parameter.leaf: TensorSpec(dtype=parameter.spec.dtype, shape=shape)}
            return Layout(components=specs, working_bytes=_TRANSPOSING)
        specs = {
            parameter.leaf: TensorSpec(dtype=torch.int8, shape=shape),
            "SCB": TensorSpec(dtype=torch.float32, shape=shape[:1]),
            "weight_format": TensorSpec(dtype=torch.uint8, shape=()),
        }
        resident = specs[parameter.leaf].nbytes + specs["SCB"].nbytes
        working = int8.working_bytes(shape[1])
        slices = Slices(dim=int(parameter.role == "linear-transposed"), working_bytes=working)
        return Layout(components=specs, working_bytes=working, resident=resident, slices=slices)

    def stored_layout(self, parameter: Parameter, found: Mapping[str, TensorSpec]) -> Layout:
        layout = self.layout(parameter)
        require_components(parameter, layout.components, found)
        return layout

    def quantize(self, parameter: Parameter, matrix: Tensor) -> dict[str, Tensor]:
        if self.config.llm_int8_has_fp16_weight:
            return {parameter.leaf: matrix.clone(memory_format=torch.contiguous_format)}
        parts = self.begin_slices(parameter, matrix.device)
        self.quantize_slice(parameter, matrix, 0, parts)
        return self.finish_slices(parameter, parts)

    def begin_slices(self, parameter: Parameter, device: torch.device) -> dict[str, Tensor]:
        shape = states.stored_shape(parameter)
        return {
            "codes": torch.empty(shape, dtype=torch.int8, device=device),
            "scales": torch.empty(shape[0], dtype=torch.float32, device=device),
        }

    def quantize_slice(self, parameter: Parameter, rows: Tensor, start: int, parts: Mapping[str, Tensor]) -> None:
        stop = start + len(rows)
        int8.quantize_rows_into(rows, parts["codes"][start:stop], parts["scales"][start:stop])

    def finish_slices(self, parameter: Parameter, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _eight_bit_components(parameter, parts["codes"], parts["scales"])

    def dequantize(self, parameter: Parameter, components: Mapping[str, Tensor]) -> Tensor:
        if self.config.llm_int8_has_fp16_weight:
            return components[parameter.leaf]
        return int8.dequantize(components[parameter.leaf], components["SCB"])

    def new_module(self, out_features: int, in_features: int, *, bias: bool) -> nn.Module:
        return Linear8bitLt(
            in_features,
            out_features,
            bias,
            has_fp16_weights=self.config.llm_int8_has_fp16_weight,
            threshold=self.config.llm_int8_threshold,
            device="meta",
        )

    def install(self, module: nn.Module, parameter: Parameter, components: Mapping[str, Tensor]) -> None:
        data = components[parameter.leaf]
        if self.config.llm_int8_has_fp16_weight:
            module.weight = bnb.nn.Int8Params(data, requires_grad=False, has_fp16_weights=True)
            return
        form = components["weight_format"].item()
        if form != 0:
            raise UnsupportedError(
                f"{parameter.name}: component 'weight_format' is {form}, expected 0 (row by row); bitsandbytes before "
                "0.45 wrote others for some GPUs: save the model anew with it, after `.cpu()`"
            )
        module.weight = bnb.nn.Int8Params(data, requires_grad=False, CB=data, SCB=components["SCB"])

    def components(self, module: nn.Module, parameter: Parameter) -> dict[str, Tensor]:
        assert isinstance(module, Linear8bitLt)
        data = module.weight.data
        if self.config.llm_int8_has_fp16_weight:
            return {parameter.leaf: data}
        scales = module.scales()
        assert scales is not None
        return _eight_bit_components(parameter, data, scales)


def _eight_bit_components(parameter: Parameter, codes: Tensor, scales: Tensor) -> dict[str, Tensor]:
    return {parameter.leaf: codes, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8, device="cpu")}
