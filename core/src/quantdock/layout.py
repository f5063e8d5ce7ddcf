"""What a quantizer declares as data: the bytes of a parameter, how it may be cut up, and what the method can do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from quantdock.tensors import TensorSpec


@dataclass(frozen=True, kw_only=True)
class Slices:
    """How a parameter is quantized slice by slice, so that one of any size passes through little memory.

    The engine cuts a large parameter along one dimension, and gives the slices to ``Quantizer.quantize_slice`` in any
    order and from several threads.
    """

    dim: int = 0
    """The dimension of the full-precision tensor that is cut."""
    multiple: int = 1
    """A slice starts at a multiple of so many rows of that dimension; only the last may be shorter."""
    working_bytes: int = 0
    """Bytes that ``quantize_slice`` allocates at the most, beside what the next field says."""
    working_copies: int = 0
    """How often it allocates as many bytes as the slice has, in the slice's dtype."""
    held_bytes: int = 0
    """Bytes that ``begin_slices`` allocates and that aren't in the finished components, and those that
    ``finish_slices`` allocates, at the most."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What one quantized parameter is stored as, declared before a byte is read."""

    components: Mapping[str, TensorSpec]
    """Component name inside the owning module (``weight``, ``weight.absmax``, ``SCB``) -> dtype and shape."""
    working_bytes: int = 0
    """Bytes that ``quantize_param`` allocates at the most, its result not counted."""
    resident: int | None = None
    """Exact bytes the loaded module holds for the parameter, where that isn't the sum of the components (a table that
    modules share, a description that is only written out when saving)."""
    variable: frozenset[str] = frozenset()
    """Components whose length is known only once they are made; the length in their spec says nothing then."""
    slices: Slices | None = None
    """How the parameter may be quantized slice by slice; ``None`` for only as a whole."""

    @property
    def nbytes(self) -> int:
        """Exact bytes the parameter will take in the loaded model."""
        return sum(spec.nbytes for spec in self.components.values()) if self.resident is None else self.resident

    def fits(self, found: Mapping[str, TensorSpec]) -> bool:
        """Whether ``found`` is what was declared."""
        fixed = {name: spec for name, spec in self.components.items() if name not in self.variable}
        return found.keys() == self.components.keys() and all(found[name] == spec for name, spec in fixed.items())


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a method can do at all, whatever the machine."""

    quantize: bool = True
    """Quantize full-precision tensors while they are loaded."""
    load: bool = True
    """Load checkpoints that are already quantized."""
    dequantize: bool = False
    save: bool = True
    train: bool = False
    """Adapters can be trained on top."""
    compile: bool = False
    """The modules survive ``torch.compile`` without graph breaks."""
