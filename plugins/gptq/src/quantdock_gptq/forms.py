"""The tensors that a weight of a linear layer is stored as, and whether those of a checkpoint are these."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantdock import TensorSpec, UnsupportedError
from quantdock_gptq import rounding
from quantdock_gptq.config import Settings

NAMES = ("qweight", "qzeros", "scales", "g_idx")
_SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def components(
    name: str, shape: tuple[int, int], settings: Settings, dtype: torch.dtype, *, indexed: bool
) -> dict[str, TensorSpec]:
    """The stored tensors of a weight.

    Args:
        name: of the weight, for messages.
        shape: ``[outputs, inputs]``.
        settings: bits and groups.
        dtype: of scales.
        indexed: whether there is a ``g_idx``.

    Raises:
        UnsupportedError: its codes or zero points don't fill whole words.
    """
    (outputs, inputs), bits = shape, settings.bits
    _, groups = settings.groups(inputs)
    if inputs * bits % 32 or outputs * bits % 32:
        raise UnsupportedError(
            f"{name}: {outputs} outputs and {inputs} inputs of {bits} bits don't fill whole words of 32; "
            "GPTQ has no form for it, so leave this parameter out"
        )
    specs = {
        "qweight": TensorSpec(dtype=torch.int32, shape=(inputs * bits // 32, outputs)),
        "qzeros": TensorSpec(dtype=torch.int32, shape=(groups, outputs * bits // 32)),
        "scales": TensorSpec(dtype=dtype, shape=(groups, outputs)),
    }
    return specs | ({"g_idx": TensorSpec(dtype=torch.int32, shape=(inputs,))} if indexed else {})


def checked(
    name: str, shape: tuple[int, int], settings: Settings, found: Mapping[str, TensorSpec], *, indexed: bool
) -> dict[str, TensorSpec]:
    """The same, for what a checkpoint has.

    Args:
        name, shape, settings: as above.
        found: component -> dtype and shape.
        indexed: whether there has to be a ``g_idx``; there may be one if not.

    Raises:
        UnsupportedError: names every component that is missing, surplus or different.
    """
    scales = found.get("scales")
    dtype = scales.dtype if scales is not None and scales.dtype in _SCALE_DTYPES else rounding.SCALE_DTYPE
    expected = components(name, shape, settings, dtype, indexed=indexed or "g_idx" in found)
    problems = [
        f"component {component!r} is missing, expected {expected[component]}"
        for component in expected.keys() - found.keys()
    ]
    problems += [f"component {component!r} is not part of the format" for component in found.keys() - expected.keys()]
    problems += [
        f"component {component!r} is {found[component]}, expected {spec}"
        for component, spec in expected.items()
        if component in found and found[component] != spec
    ]
    if problems:
        raise UnsupportedError(
            f"{name}: {'; '.join(sorted(problems))}, for {settings.bits} bits and group_size={settings.group_size}. "
            "The files and the quantization_config (or its dynamic) contradict each other, or the download is "
            "incomplete"
        )
    return expected


def stands_for(found: Mapping[str, TensorSpec]) -> TensorSpec | None:
    """Dtype and shape of the weight that stored tensors stand for, which they tell whatever the number of bits is."""
    qweight, qzeros, scales = (found.get(name) for name in ("qweight", "qzeros", "scales"))
    if qweight is None or len(qweight.shape) != 2:
        return None
    words, outputs = qweight.shape
    dtype = rounding.SCALE_DTYPE if scales is None else scales.dtype
    index = found.get("g_idx")
    if index is not None and len(index.shape) == 1:
        return TensorSpec(dtype=dtype, shape=(outputs, index.shape[0]))
    if qzeros is None or len(qzeros.shape) != 2 or not qzeros.shape[1]:
        return None
    return TensorSpec(dtype=dtype, shape=(outputs, words * outputs // qzeros.shape[1]))


def damage(tensors: Mapping[str, Tensor]) -> str | None:
    """What is wrong with the values of stored tensors, of one weight or of many; ``None`` when nothing is."""
    index = next((tensor for name, tensor in tensors.items() if name.endswith("g_idx")), None)
    if index is None:
        return None
    groups = next(tensor for name, tensor in tensors.items() if name.endswith("scales")).shape[-2]
    first, last = int(index.min()), int(index.max())
    if first >= 0 and last < groups:
        return None
    return f"g_idx names the groups {first} to {last}, but there are scales for 0 to {groups - 1}"
