"""What bitsandbytes stores beside a 4-bit weight: declared, read, and checked before it is used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from bitsandbytes.functional import QuantState
from torch import Tensor

from quantdock import Parameter, TensorSpec, UnsupportedError
from quantdock_bnb.config import BLOCKSIZES, QUANT_TYPES
from quantdock_bnb.fourbit import NESTED_BLOCKSIZE

_FLOATS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_LONGEST_NUMBER = -1.1754943508222875e-38
"""No float32 takes more characters when Python writes it as a double."""

MAX_DESCRIPTION = 4096
"""Bytes of JSON at the most; bitsandbytes writes about 200."""


def description_name(leaf: str, quant_type: str) -> str:
    """Component that describes the others: JSON as bytes."""
    return f"{leaf}.quant_state.bitsandbytes__{quant_type}"


def stored_shape(parameter: Parameter) -> tuple[int, ...]:
    """``[out, in]``: the orientation that bitsandbytes quantizes and stores, whatever the parameter's own."""
    shape = parameter.spec.shape
    return shape[::-1] if parameter.role == "linear-transposed" else shape


def component_specs(
    parameter: Parameter, *, quant_type: str, blocksize: int, nested: bool, quant_storage: torch.dtype
) -> dict[str, TensorSpec]:
    """The components of a 4-bit parameter, in state dict order. With nested scales the description's length is the
    longest possible; else it is exact.

    Raises:
        UnsupportedError: the packed codes don't fill whole elements of ``quant_storage``.
    """
    count, leaf = parameter.spec.numel, parameter.leaf
    packed, scales = (count + 1) // 2, -(-count // blocksize)
    if packed % quant_storage.itemsize:
        raise UnsupportedError(
            f"{parameter.name}: {packed} bytes of 4-bit codes don't fill whole elements of "
            f"bnb_4bit_quant_storage={quant_storage}; use torch.uint8, or leave this parameter out"
        )
    specs = {
        leaf: TensorSpec(dtype=quant_storage, shape=(packed // quant_storage.itemsize, 1)),
        f"{leaf}.absmax": TensorSpec(dtype=torch.uint8 if nested else torch.float32, shape=(scales,)),
        f"{leaf}.quant_map": TensorSpec(dtype=torch.float32, shape=(16,)),
    }
    if nested:
        groups = -(-scales // NESTED_BLOCKSIZE)
        specs[f"{leaf}.nested_absmax"] = TensorSpec(dtype=torch.float32, shape=(groups,))
        specs[f"{leaf}.nested_quant_map"] = TensorSpec(dtype=torch.float32, shape=(256,))
    length = _description_length(parameter, quant_type, blocksize, nested)
    return specs | {description_name(leaf, quant_type): TensorSpec(dtype=torch.uint8, shape=(length,))}


def _description_length(parameter: Parameter, quant_type: str, blocksize: int, nested: bool) -> int:
    description: dict[str, Any] = {
        "quant_type": quant_type,
        "blocksize": blocksize,
        "dtype": str(parameter.spec.dtype).removeprefix("torch."),
        "shape": stored_shape(parameter),
    }
    if nested:
        description |= {
            "nested_blocksize": NESTED_BLOCKSIZE,
            "nested_dtype": "float32",
            "nested_offset": _LONGEST_NUMBER,
        }
    return len(json.dumps(description))


def resident_bytes(specs: Mapping[str, TensorSpec], description: str) -> int:
    """Exact bytes of the tensors that a loaded 4-bit parameter holds: packed codes, scales, code table, and, with
    nested scales, the same again for those and their offset. The description is written out only when saving."""
    nested = any(name.endswith(".nested_absmax") for name in specs)
    return sum(spec.nbytes for name, spec in specs.items() if name != description) + 4 * nested


def scale_sizes(parameter: Parameter) -> dict[int, int]:
    """Number of scales -> block size, over all block sizes; where several fit, the smallest."""
    return {-(-parameter.spec.numel // size): size for size in reversed(BLOCKSIZES)}


def read_state(parameter: Parameter, components: Mapping[str, Tensor]) -> QuantState:
    """The state that undoes the quantization, on the device of the components.

    Raises:
        UnsupportedError: the description isn't what bitsandbytes writes, or contradicts the other components.
    """
    leaf = parameter.leaf
    name = next(name for kind in QUANT_TYPES if (name := description_name(leaf, kind)) in components)
    nested = f"{leaf}.nested_absmax" in components
    absmax = components[f"{leaf}.absmax"]
    count, scales = parameter.spec.numel, absmax.numel()
    described = _Description(parameter, name, components[name], nested=nested)
    described.expect("shape", list(stored_shape(parameter)))
    described.expect("quant_type", name.rpartition("__")[2])
    blocksize = described.one_of("blocksize", [s for s in BLOCKSIZES if -(-count // s) == scales])
    dtype = described.one_of("dtype", list(_FLOATS))
    state = QuantState(
        absmax=absmax,
        shape=torch.Size(stored_shape(parameter)),
        code=components[f"{leaf}.quant_map"],
        blocksize=blocksize,
        quant_type=described.values["quant_type"],
        dtype=_FLOATS[dtype],
    )
    if nested:
        described.expect("nested_blocksize", NESTED_BLOCKSIZE)
        described.expect("nested_dtype", "float32")
        offset = torch.tensor(described.number("nested_offset"), dtype=torch.float32, device=absmax.device)
        state.offset = offset
        state.state2 = QuantState(
            absmax=components[f"{leaf}.nested_absmax"],
            code=components[f"{leaf}.nested_quant_map"],
            blocksize=NESTED_BLOCKSIZE,
            dtype=torch.float32,
        )
        state.nested = True
    return state


class _Description:
    """The JSON of a 4-bit parameter, with checks that say where they failed."""

    _PLAIN = frozenset({"quant_type", "blocksize", "dtype", "shape"})
    _NESTED = frozenset({"nested_blocksize", "nested_dtype", "nested_offset"})

    def __init__(self, parameter: Parameter, component: str, blob: Tensor, *, nested: bool) -> None:
        self._where = f"{parameter.name}: component {component!r}"
        try:
            values = json.loads(blob.cpu().numpy().tobytes().decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise UnsupportedError(f"{self._where} is no JSON ({error})") from error
        if not isinstance(values, dict):
            raise UnsupportedError(f"{self._where} is {type(values).__name__}, expected a JSON object")
        expected = self._PLAIN | self._NESTED if nested else self._PLAIN
        if values.keys() != expected:
            raise UnsupportedError(f"{self._where} has the keys {sorted(values)}, expected {sorted(expected)}")
        self.values: dict[str, Any] = values

    def expect(self, key: str, value: Any) -> None:
        if self.values[key] != value:
            raise UnsupportedError(f"{self._where} says {key}={self.values[key]!r}, expected {value!r}")

    def one_of(self, key: str, choices: list[Any]) -> Any:
        value = self.values[key]
        if isinstance(value, bool) or value not in choices:
            raise UnsupportedError(f"{self._where} says {key}={value!r}, expected one of {choices}")
        return value

    def number(self, key: str) -> float:
        value = self.values[key]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UnsupportedError(f"{self._where} says {key}={value!r}, expected a number")
        return float(value)
