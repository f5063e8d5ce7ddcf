"""What bitsandbytes stores beside a 4-bit weight: declared, read, and checked before it is used."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

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
    absmax = components[f"{leaf}.absmax"]
    try:
        described = _described(
            components[name].cpu().numpy().tobytes(),
            quant_type=name.rpartition("__")[2],
            shape=stored_shape(parameter),
            scales=absmax.numel(),
            nested=f"{leaf}.nested_absmax" in components,
        )
    except ValueError as error:
        raise UnsupportedError(f"{parameter.name}: component {name!r} {error}") from error
    state = QuantState(
        absmax=absmax,
        shape=torch.Size(described.shape),
        code=components[f"{leaf}.quant_map"],
        blocksize=described.blocksize,
        quant_type=described.quant_type,
        dtype=described.dtype,
    )
    if described.nested_offset is not None:
        state.offset = torch.tensor(described.nested_offset, dtype=torch.float32, device=absmax.device)
        state.state2 = QuantState(
            absmax=components[f"{leaf}.nested_absmax"],
            code=components[f"{leaf}.nested_quant_map"],
            blocksize=NESTED_BLOCKSIZE,
            dtype=torch.float32,
        )
        state.nested = True
    return state


class _Description(NamedTuple):
    """What the JSON of a 4-bit parameter says."""

    quant_type: str
    blocksize: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    nested_offset: float | None
    """What was subtracted from scales before they were quantized; ``None`` where they weren't."""


_PLAIN = frozenset({"quant_type", "blocksize", "dtype", "shape"})
_NESTED = frozenset({"nested_blocksize", "nested_dtype", "nested_offset"})


@functools.lru_cache(maxsize=1024)
def _described(text: bytes, *, quant_type: str, shape: tuple[int, ...], scales: int, nested: bool) -> _Description:
    """Read a description, which must say what the other components say. All layers of a shape have the same.

    Raises:
        ValueError: it doesn't; says what it says.
    """
    try:
        values = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is no JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"is {type(values).__name__}, expected a JSON object")
    expected = _PLAIN | _NESTED if nested else _PLAIN
    if values.keys() != expected:
        raise ValueError(f"has the keys {sorted(values)}, expected {sorted(expected)}")
    _expect(values, "shape", list(shape))
    _expect(values, "quant_type", quant_type)
    sizes = [size for size in BLOCKSIZES if -(-math.prod(shape) // size) == scales]
    blocksize = _one_of(values, "blocksize", sizes)
    dtype = _one_of(values, "dtype", list(_FLOATS))
    if nested:
        _expect(values, "nested_blocksize", NESTED_BLOCKSIZE)
        _expect(values, "nested_dtype", "float32")
    offset = _number(values, "nested_offset") if nested else None
    return _Description(quant_type, blocksize, _FLOATS[dtype], shape, offset)


def _expect(values: Mapping[str, Any], key: str, value: Any) -> None:
    if values[key] != value:
        raise ValueError(f"says {key}={values[key]!r}, expected {value!r}")


def _one_of(values: Mapping[str, Any], key: str, choices: list[Any]) -> Any:
    value = values[key]
    if isinstance(value, bool) or value not in choices:
        raise ValueError(f"says {key}={value!r}, expected one of {choices}")
    return value


def _number(values: Mapping[str, Any], key: str) -> float:
    value = values[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"says {key}={value!r}, expected a number")
    return float(value)
