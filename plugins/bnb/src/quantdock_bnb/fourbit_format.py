"""nf4 and fp4 as a format: what is stored, what is made of a tensor, and what goes into a model."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from quantdock import Layout, Parameter, Slices, TensorSpec, UnsupportedError
from quantdock_bnb import fourbit, states
from quantdock_bnb.config import COMPUTE_DTYPES, DEFAULT_BLOCKSIZE, QUANT_TYPES
from quantdock_bnb.formats import Format, require_components
from quantdock_bnb.modules import Linear4bit


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
        working = fourbit.WORKING_BYTES + (8 * scales + fourbit.NESTED_WORKING_BYTES if nested else 0)
        transposed = parameter.role == "linear-transposed"
        columns = states.stored_shape(parameter)[1]
        slices = Slices(
            dim=int(transposed),
            multiple=blocksize // math.gcd(blocksize, columns),  # no block in two slices
            working_bytes=fourbit.WORKING_BYTES,
            working_copies=int(transposed),
            held_bytes=working - fourbit.WORKING_BYTES + 4 * scales * nested,
        )
        if transposed:
            working += parameter.spec.nbytes
        return self._layout(parameter, specs, working_bytes=working, variable=nested, slices=slices)

    def _specs(self, parameter: Parameter, blocksize: int, *, nested: bool) -> dict[str, TensorSpec]:
        return states.component_specs(
            parameter,
            quant_type=self.config.bnb_4bit_quant_type,
            blocksize=blocksize,
            nested=nested,
            quant_storage=self.config.bnb_4bit_quant_storage,
        )

    def _layout(
        self,
        parameter: Parameter,
        specs: Mapping[str, TensorSpec],
        *,
        working_bytes: int,
        variable: bool,
        slices: Slices | None = None,
    ) -> Layout:
        description = states.description_name(parameter.leaf, self.config.bnb_4bit_quant_type)
        return Layout(
            components=specs,
            working_bytes=working_bytes,
            resident=states.resident_bytes(specs, description),
            variable=frozenset({description}) if variable else frozenset(),
            slices=slices,
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
        parts = self.begin_slices(parameter, matrix.device)
        self.quantize_slice(parameter, matrix, 0, parts)
        return self.finish_slices(parameter, parts)

    def begin_slices(self, parameter: Parameter, device: torch.device) -> dict[str, Tensor]:
        if torch.get_default_dtype() != torch.float32:
            raise UnsupportedError(
                f"{parameter.name}: torch's default dtype is {torch.get_default_dtype()}, and bitsandbytes makes its "
                "code tables in it; call torch.set_default_dtype(torch.float32) before loading"
            )
        count = parameter.spec.numel
        scales = -(-count // self.config.bnb_4bit_blocksize)
        return {
            "packed": torch.empty((count + 1) // 2, dtype=torch.uint8, device=device),
            "absmax": torch.empty(scales, dtype=torch.float32, device=device),
        }

    def quantize_slice(self, parameter: Parameter, rows: Tensor, start: int, parts: Mapping[str, Tensor]) -> None:
        blocksize = self.config.bnb_4bit_blocksize
        first = start * states.stored_shape(parameter)[1]
        last = first + rows.numel()
        fourbit.quantize_into(
            rows.contiguous().view(-1),
            parts["packed"][first // 2 : (last + 1) // 2],
            parts["absmax"][first // blocksize : -(-last // blocksize)],
            quant_type=self.config.bnb_4bit_quant_type,
            blocksize=blocksize,
        )

    def finish_slices(self, parameter: Parameter, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        state = fourbit.state_of(
            parts["absmax"],
            shape=torch.Size(states.stored_shape(parameter)),
            dtype=parameter.spec.dtype,
            blocksize=self.config.bnb_4bit_blocksize,
            quant_type=self.config.bnb_4bit_quant_type,
            nested=self.config.bnb_4bit_use_double_quant,
        )
        data = parts["packed"].view(self.config.bnb_4bit_quant_storage).unsqueeze(1)
        return fourbit.to_components(parameter.leaf, data, state)

    def dequantize(self, parameter: Parameter, components: Mapping[str, Tensor]) -> Tensor:
        return fourbit.dequantize(components[parameter.leaf], states.read_state(parameter, components))

    def new_module(self, out_features: int, in_features: int, *, bias: bool) -> nn.Module:
        return self._template(out_features, in_features, bias=bias).twin()

    @functools.cache  # noqa: B019 - lives as long as the quantizer
    def _template(self, out_features: int, in_features: int, *, bias: bool) -> Linear4bit:
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
        module._parameters[parameter.leaf] = bnb.nn.Params4bit(
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
