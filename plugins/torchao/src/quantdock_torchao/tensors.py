"""torchao's tensors and what they are stored as: plain tensors, and a description in the header of the file.

The form is that of ``torchao.prototype.safetensors``: the tensor ``x.y.weight`` is stored as ``x.y._weight_qdata``,
``x.y._weight_scale`` and so on, and the file's metadata has, under ``x.y.weight``, a JSON object with its class
(``_type``), what isn't a tensor (``_data``) and the names of what is (``_tensor_data_names``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from quantdock import Parameter, TensorSpec, UnsupportedError
from quantdock_torchao import upstream

KINDS: Mapping[str, tuple[torch.dtype, ...]] = {
    "Int8Tensor": (torch.int8,),
    "IntxUnpackedToInt8Tensor": (torch.int8,),
    "Float8Tensor": (torch.float8_e4m3fn, torch.float8_e5m2),
}
"""The classes that can be used, as their parts can be checked when they are loaded -> the dtypes of their codes."""

PLAIN = json.dumps({"_type": "Tensor"})
"""The description of a tensor that isn't quantized."""

_KEYS = {"_type", "_data", "_tensor_data_names"}
_SCALES = (torch.float32, torch.bfloat16, torch.float16)

_AGAIN = "fetch or save the files again, or quantize the original weights"
"""What to do about files that don't fit themselves."""


@dataclass(frozen=True, kw_only=True)
class Described:
    """One quantized parameter without its values."""

    description: str
    """The JSON object of the file's metadata."""
    components: Mapping[str, TensorSpec]
    block: tuple[int, ...]
    """The elements along each dimension that share one scale."""

    @property
    def kind(self) -> str:
        """Name of torchao's class."""
        return str(json.loads(self.description)["_type"])


def component(leaf: str, part: str) -> str:
    """The stored name of a part of the parameter ``leaf``, inside of its module."""
    return f"_{leaf}_{part}"


def parts_of(leaf: str, tensor: Any) -> dict[str, torch.Tensor]:
    """The components of one of torchao's tensors; they are its own, not copies."""
    names = [*tensor.tensor_data_names, *getattr(tensor, "optional_tensor_data_names", ())]
    found = {name: getattr(tensor, name, None) for name in names}
    return {component(leaf, name): part for name, part in found.items() if part is not None}


def by_part(leaf: str, components: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Components under torchao's own names for them."""
    return {name.removeprefix(component(leaf, "")): part for name, part in components.items()}


def describe(tensor: Any) -> str:
    """The description that torchao itself writes."""
    encoder = upstream.module("torchao.prototype.safetensors.safetensors_utils").TensorSubclassAttributeJSONEncoder
    return json.dumps(tensor, cls=encoder)


def misfit(tensor: Any) -> str | None:
    """Why what torchao has made of a weight can't be used; ``None`` when it can."""
    kind = type(tensor).__name__
    if type(tensor) is torch.nn.Parameter:
        return "leaves the weight as it is, and raises no error"
    if kind not in KINDS:
        return f"makes {kind} of it; what can be used is {', '.join(KINDS)}"
    if tensor.qdata.dtype not in KINDS[kind]:
        return f"makes {kind} of {_names([tensor.qdata.dtype])}; what can be loaded again is {_names(KINDS[kind])}"
    return None


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def described(leaf: str, tensor: Any) -> Described:
    """What a quantized tensor (on the meta device, for one) is stored as."""
    return Described(
        description=describe(tensor),
        components={name: TensorSpec.of(part) for name, part in parts_of(leaf, tensor).items()},
        block=tuple(tensor.block_size),
    )


def build(leaf: str, description: str, components: Mapping[str, torch.Tensor]) -> Any:
    """torchao's tensor from its components, none of which is copied."""
    data = json.loads(description)
    data["_data"] |= by_part(leaf, components)
    return upstream.module("torchao.prototype.safetensors.safetensors_utils").object_from_dict(data)


def read(parameter: Parameter, description: str, found: Mapping[str, TensorSpec]) -> Described:
    """What a parameter is stored as, of which a file's metadata and header say this.

    Raises:
        UnsupportedError: the description isn't what torchao writes, or contradicts the parameter or the components.
    """
    where = f"{parameter.name}: its description in the file's metadata"
    data = _parsed(where, description)
    names = {component(parameter.leaf, name) for name in data["_tensor_data_names"]}
    problems = [f"component {name!r} is missing" for name in names - found.keys()]
    problems += [f"component {name!r} is not part of it" for name in found.keys() - names]
    if problems:
        raise UnsupportedError(f"{where} doesn't fit what is stored: {'; '.join(sorted(problems))}; {_AGAIN}")
    empty = {name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for name, spec in found.items()}
    try:
        tensor = build(parameter.leaf, description, empty)
        same = json.loads(describe(tensor)) == data
    except Exception as error:  # torchao raises all kinds of them
        raise UnsupportedError(f"{where} can't be used ({error}); {_AGAIN}") from error
    if not same:
        raise UnsupportedError(f"{where} isn't what torchao would write for it; {_AGAIN}")
    _check(parameter, tensor, found)
    _try_out(where, tensor)
    return described(parameter.leaf, tensor)


def _parsed(where: str, description: str) -> dict[str, Any]:
    try:
        data = json.loads(description)
    except (ValueError, RecursionError) as error:
        raise UnsupportedError(f"{where} is no JSON ({error}); {_AGAIN}") from error
    if not isinstance(data, dict) or data.keys() != _KEYS or not isinstance(data["_data"], dict):
        raise UnsupportedError(
            f"{where} is {description:.200}, expected an object with {', '.join(sorted(_KEYS))}; {_AGAIN}"
        )
    if not isinstance(data["_type"], str) or data["_type"] not in KINDS:
        raise UnsupportedError(
            f"{where} says _type={data['_type']!r}; what can be loaded is {', '.join(KINDS)}. torchao itself may know "
            "the class; or quantize the original weights"
        )
    names = data["_tensor_data_names"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UnsupportedError(f"{where} says _tensor_data_names={names!r}, expected a list of names; {_AGAIN}")
    return data


def _check(parameter: Parameter, tensor: Any, found: Mapping[str, TensorSpec]) -> None:
    """Raise unless every part has the shape and dtype that the parameter and the block size ask for."""
    spec = parameter.spec
    if tensor.dtype != spec.dtype:
        raise UnsupportedError(
            f"{parameter.name}: stored to be used in {tensor.dtype}, but the model is loaded in {spec.dtype}; pass "
            f"dtype={str(tensor.dtype).removeprefix('torch.')!r}"
        )
    block: object = tensor.block_size
    fits = isinstance(block, list) and len(block) == len(spec.shape)
    if not fits or any(type(size) is not int or size < 1 for size in tensor.block_size):
        raise UnsupportedError(
            f"{parameter.name}: block_size is {block!r}, expected a size for each dimension of {list(spec.shape)}; "
            f"{_AGAIN}"
        )
    if any(size % part for size, part in zip(spec.shape, tensor.block_size, strict=True)):
        raise UnsupportedError(f"{parameter.name}: blocks of {block!r} don't divide {list(spec.shape)}; {_AGAIN}")
    scales = tuple(size // part for size, part in zip(spec.shape, tensor.block_size, strict=True))
    expected = {
        "qdata": (spec.shape, KINDS[type(tensor).__name__]),
        "scale": (scales, _SCALES),
        "zero_point": (scales, (torch.int8, *_SCALES)),
    }
    for name, stored in found.items():
        part = name.removeprefix(component(parameter.leaf, ""))
        if part not in expected:
            raise UnsupportedError(f"{parameter.name}: a stored {part!r} can't be used yet; torchao itself can load it")
        shape, dtypes = expected[part]
        if stored.shape != shape or stored.dtype not in dtypes:
            raise UnsupportedError(
                f"{parameter.name}: component {name!r} is {stored}, expected shape {list(shape)} and one of "
                f"{_names(dtypes)}; {_AGAIN}"
            )


def _try_out(where: str, tensor: Any) -> None:
    """Raise unless a matrix computes, without values: what it says of activations is used for the first time here."""
    if tensor.dim() != 2:
        return
    try:
        torch.nn.functional.linear(torch.empty(1, tensor.shape[1], dtype=tensor.dtype, device="meta"), tensor)
    except Exception as error:  # torchao raises all kinds of them
        raise UnsupportedError(f"{where} can't be used: torchao doesn't compute with it ({error})") from error
