"""The two formats of bitsandbytes, each as what it stores, what it makes of a tensor, and what it puts into a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from quantdock import Layout, Parameter, TensorSpec, UnsupportedError
from quantdock_bnb import fourbit, int8, states
from quantdock_bnb.config import COMPUTE_DTYPES, DEFAULT_BLOCKSIZE, QUANT_TYPES, BitsAndBytesConfig
from quantdock_bnb.modules import Linear4bit, Linear8bitLt

_TRANSPOSING = 64 << 10
"""More than torch takes to copy a transposed matrix, tile by tile."""


class Format(ABC):
    """One way of bitsandbytes to store the weight of a linear layer."""

    def __init__(self, config: BitsAndBytesConfig) -> None:
        self.config = config

    @abstractmethod
    def companions(self) -> frozenset[str]:
        """Components beside the weight, named after it."""

    @abstractmethod
    def layout(self, parameter: Parameter) -> Layout:
        """See ``Quantizer.layout``."""

    @abstractmethod
    def stored_layout(self, parameter: Parameter, found: Mapping[str, TensorSpec]) -> Layout:
        """See ``Quantizer.stored_layout``."""

    @abstractmethod
    def quantize(self, parameter: Parameter, matrix: Tensor) -> dict[str, Tensor]:
        """Components of ``matrix``, ``[out, in]`` with any strides."""

    @abstractmethod
    def dequantize(self, parameter: Parameter, components: Mapping[str, Tensor]) -> Tensor:
        """The matrix ``[out, in]`` again, in the format's own dtype."""

    @abstractmethod
    def new_module(self, out_features: int, in_features: int, *, bias: bool) -> nn.Module:
        """An empty layer on the meta device."""

    @abstractmethod
    def install(self, module: nn.Module, parameter: Parameter, components: Mapping[str, Tensor]) -> None:
        """Give ``module`` its weight."""

    @abstractmethod
    def components(self, module: nn.Module, parameter: Parameter) -> dict[str, Tensor]:
        """The stored tensors of ``module``'s weight; the reverse of ``install``."""


def require_components(
    parameter: Parameter, expected: Mapping[str, TensorSpec], found: Mapping[str, TensorSpec], *, but: str = ""
) -> None:
    """Raise unless ``found`` is ``expected``, the component ``but`` aside.

    Raises:
        UnsupportedError: names the parameter and every component that is missing, surplus or different.
    """
    problems = [f"component {name!r} is missing, expected {expected[name]}" for name in expected.keys() - found.keys()]
    problems += [f"component {name!r} is not part of the format" for name in found.keys() - expected.keys()]
    problems += [
        f"component {name!r} is {found[name]}, expected {spec}"
        for name, spec in expected.items()
        if name in found and name != but and found[name] != spec
    ]
    if problems:
        raise UnsupportedError(f"{parameter.name}: " + "; ".join(sorted(problems)))


class FourBit(Format):
    """nf4 and fp4, with plain or with quantized scales."""

    def companions(self) -> frozenset[str]:
        plain = ("weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map")
        return frozenset([*plain, *(states.description_name("weight", kind) for kind in QUANT_TYPES)])

    def layout(self, parameter: Parameter) -> Layout:
        if parameter.spec.dtype not in COMPUTE_DTYPES:
            raise UnsupportedError(
                f"{parameter.name} is {parameter.spec.dtype}; bitsandbytes quantizes float16, bfloat16 and float32 to "
                "4 bits, so load it with one of those as dtype="
            )
        nested, blocksize = self.config.bnb_4bit_use_double_quant, self.config.bnb_4bit_blocksize
        specs = self._specs(parameter, blocksize, nested=nested)
        scales = -(-parameter.spec.numel // blocksize)
        # Nested scales exist twice for a moment, and their quantization has a table of its own.
        working = fourbit.WORKING_BYTES + (8 * scales + 4096 if nested else 0)
        if parameter.role == "linear-transposed":
            working += parameter.spec.nbytes
        return self._layout(parameter, specs, working_bytes=working, variable=nested)

    def _specs(self, parameter: Parameter, blocksize: int, *, nested: bool) -> dict[str, TensorSpec]:
        return states.component_specs(
            parameter,
            quant_type=self.config.bnb_4bit_quant_type,
            blocksize=blocksize,
            nested=nested,
            quant_storage=self.config.bnb_4bit_quant_storage,
        )

    def _layout(
        self, parameter: Parameter, specs: Mapping[str, TensorSpec], *, working_bytes: int, variable: bool
    ) -> Layout:
        description = states.description_name(parameter.leaf, self.config.bnb_4bit_quant_type)
        return Layout(
            components=specs,
            working_bytes=working_bytes,
            resident=states.resident_bytes(specs, description),
            variable=frozenset({description}) if variable else frozenset(),
        )

    def stored_layout(self, parameter: Parameter, found: Mapping[str, TensorSpec]) -> Layout:
        leaf = parameter.leaf
        absmax = found.get(f"{leaf}.absmax")
        if absmax is None:
            raise UnsupportedError(
                f"{parameter.name}: component '{leaf}.absmax' is missing, found {', '.join(map(repr, found))}; "
                "it isn't stored in bitsandbytes' 4-bit format"
            )
        sizes = states.scale_sizes(parameter)
        blocksize = sizes.get(absmax.numel)
        asked = self.config.bnb_4bit_blocksize
        if asked != DEFAULT_BLOCKSIZE:
            sizes, blocksize = {-(-parameter.spec.numel // asked): asked}, asked
        if blocksize is None or absmax.numel not in sizes:
            raise UnsupportedError(
                f"{parameter.name}: component '{leaf}.absmax' is {absmax}, expected one scale for each block of "
                f"{' or '.join(map(str, sorted(sizes.values())))} elements, so {' or '.join(map(str, sizes))} in all"
            )
        specs = self._specs(parameter, blocksize, nested=absmax.dtype == torch.uint8)
        description = states.description_name(leaf, self.config.bnb_4bit_quant_type)
        require_components(parameter, specs, found, but=description)
        blob = found[description]
        if blob.dtype != torch.uint8 or len(blob.shape) != 1 or blob.numel > states.MAX_DESCRIPTION:
            raise UnsupportedError(
                f"{parameter.name}: component {description!r} is {blob}, expected up to {states.MAX_DESCRIPTION} bytes"
            )
        return self._layout(parameter, specs | {description: blob}, working_bytes=0, variable=False)

    def quantize(self, parameter: Parameter, matrix: Tensor) -> dict[str, Tensor]:
        if torch.get_default_dtype() != torch.float32:
            raise UnsupportedError(
                f"{parameter.name}: torch's default dtype is {torch.get_default_dtype()}, and bitsandbytes makes its "
                "code tables in it; call torch.set_default_dtype(torch.float32) before loading"
            )
        data, state = fourbit.quantize(
            matrix.contiguous(),
            quant_type=self.config.bnb_4bit_quant_type,
            blocksize=self.config.bnb_4bit_blocksize,
            nested=self.config.bnb_4bit_use_double_quant,
            quant_storage=self.config.bnb_4bit_quant_storage,
        )
        return fourbit.to_components(parameter.leaf, data, state)

    def dequantize(self, parameter: Parameter, components: Mapping[str, Tensor]) -> Tensor:
        return fourbit.dequantize(components[parameter.leaf], states.read_state(parameter, components))

    def new_module(self, out_features: int, in_features: int, *, bias: bool) -> nn.Module:
        module = Linear4bit(
            in_features,
            out_features,
            bias,
            self.config.bnb_4bit_compute_dtype,
            compress_statistics=self.config.bnb_4bit_use_double_quant,
            quant_type=self.config.bnb_4bit_quant_type,
            quant_storage=self.config.bnb_4bit_quant_storage,
            device="meta",
        )
        module.weight.blocksize = self.config.bnb_4bit_blocksize
        return module

    def install(self, module: nn.Module, parameter: Parameter, components: Mapping[str, Tensor]) -> None:
        state = states.read_state(parameter, components)
        data = components[parameter.leaf]
        module.weight = bnb.nn.Params4bit(
            data,
            requires_grad=False,
            quant_state=state,
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type,
            quant_storage=data.dtype,
            module=module,
            bnb_quantized=True,
        )
        module.quant_state = state

    def components(self, module: nn.Module, parameter: Parameter) -> dict[str, Tensor]:
        assert isinstance(module, Linear4bit)
        data, state = module.stored()
        assert state is not None
        return fourbit.to_components(parameter.leaf, data.detach(), state)


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
        return Layout(components=specs, working_bytes=int8.working_bytes(shape[1]), resident=resident)

    def stored_layout(self, parameter: Parameter, found: Mapping[str, TensorSpec]) -> Layout:
        layout = self.layout(parameter)
        require_components(parameter, layout.components, found)
        return layout

    def quantize(self, parameter: Parameter, matrix: Tensor) -> dict[str, Tensor]:
        if self.config.llm_int8_has_fp16_weight:
            return {parameter.leaf: matrix.clone(memory_format=torch.contiguous_format)}
        codes, scales = int8.quantize(matrix)
        return {parameter.leaf: codes, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8, device="cpu")}

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
        return {parameter.leaf: data, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8, device="cpu")}
