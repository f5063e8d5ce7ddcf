"""Which tensors a weight of a linear layer is stored as, and whether those of a checkpoint are these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from quantdock import TensorSpec, UnsupportedError
from quantdock_awq import rounding
from quantdock_awq.packing import GEMM, GEMV, GEMV_FAST, Packing

NAMES = ("qweight", "qzeros", "scaled_zeros", "scales")
_SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_PACKINGS: Mapping[str, Packing] = {"gemm": GEMM, "gemv": GEMV, "gemv_fast": GEMV_FAST, "llm-awq": GEMV_FAST}


def packing_of(version: str, found: Mapping[str, TensorSpec]) -> Packing:
    """The form of a weight. llm-awq had gemv's before it had its own.

    Args:
        version: as the config says.
        found: component -> dtype and shape; a ``qweight`` tells the older form.
    """
    qweight = found.get("qweight")
    if version == "llm-awq" and qweight is not None and qweight.dtype == torch.int32:
        return GEMV
    return _PACKINGS[version]


@dataclass(frozen=True, kw_only=True)
class Form:
    """A weight ``[outputs, inputs]`` in a packing.

    Raises:
        UnsupportedError: it has no such form.
    """

    name: str
    """Of the weight, for messages."""
    shape: tuple[int, int]
    size: int
    """Inputs per group, never -1."""
    packing: Packing

    def __post_init__(self) -> None:
        (outputs, inputs), size = self.shape, self.size
        if inputs % size:
            raise UnsupportedError(
                f"{self.name}: groups of {size} don't divide its {inputs} inputs; choose a group_size that does, "
                "or -1 for one group, or leave this parameter out"
            )
        misfit = self.packing.misfit(outputs, inputs, size)
        if misfit is not None:
            raise UnsupportedError(
                f"{self.name}: {misfit}; AWQ's version {self.packing.label!r} has no form for it, so leave this "
                "parameter out"
            )

    def components(self, dtype: torch.dtype, found: Mapping[str, TensorSpec] | None = None) -> dict[str, TensorSpec]:
        """The stored tensors, with scales in ``dtype``, under the names that are there if they were found."""
        specs = self.packing.components(*self.shape, self.size, dtype)
        usual = self.packing.zeros_names[0]
        name = next((name for name in self.packing.zeros_names if found is not None and name in found), usual)
        return {name if key == usual else key: spec for key, spec in specs.items()}

    def checked(self, stored: str, found: Mapping[str, TensorSpec], group_size: int) -> dict[str, TensorSpec]:
        """The stored tensors of a checkpoint.

        Args:
            stored: what messages call the layer.
            found: component -> dtype and shape.
            group_size: as the config says.

        Raises:
            UnsupportedError: names every component that is missing, surplus or different.
        """
        scales = found.get("scales")
        dtype = scales.dtype if scales is not None and scales.dtype in _SCALE_DTYPES else rounding.SCALE_DTYPE
        expected = self.components(dtype, found)
        problems = [
            f"component {name!r} is missing, expected {expected[name]}" for name in expected.keys() - found.keys()
        ]
        problems += [f"component {name!r} is not part of the format" for name in found.keys() - expected.keys()]
        problems += [
            f"component {name!r} is {found[name]}, expected {spec}"
            for name, spec in expected.items()
            if name in found and found[name] != spec
        ]
        if problems:
            raise UnsupportedError(
                f"{stored}: {'; '.join(sorted(problems))}, for version={self.packing.label!r} and "
                f"group_size={group_size}. {self._advice(found)}"
            )
        return expected

    def _advice(self, found: Mapping[str, TensorSpec]) -> str:
        """What may be the matter with stored tensors that don't fit."""
        outputs, inputs = self.shape
        for other in (GEMM, GEMV, GEMV_FAST):
            if other is self.packing or other.misfit(outputs, inputs, inputs) is not None:
                continue
            qweight = other.components(outputs, inputs, inputs, rounding.SCALE_DTYPE)["qweight"]
            if qweight == found.get("qweight"):
                return f"The files look like version {other.label!r}: correct the version in the quantization_config"
        return (
            "The files and the quantization_config contradict each other, or the download is incomplete; a layout that "
            "a runtime made (marlin's) isn't read"
        )


def stands_for(version: str, found: Mapping[str, TensorSpec]) -> TensorSpec | None:
    """Dtype and shape of the weight that stored tensors stand for, as far as these tell; whether they are of that
    version at all is for ``Form.checked`` to say."""
    qweight, scales = found.get("qweight"), found.get("scales")
    if qweight is None or len(qweight.shape) != 2:
        return None
    dtype = rounding.SCALE_DTYPE if scales is None else scales.dtype
    shapes = [packing.shape_of(qweight.shape) for packing in (packing_of(version, found), GEMM, GEMV, GEMV_FAST)]
    fits = (shape for shape in shapes if scales is not None and shape[0] in scales.shape)
    return TensorSpec(dtype=dtype, shape=next(fits, shapes[0]))
