"""The ledger of a load: what becomes of every parameter and every stored tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Action = Literal["map", "copy", "convert", "quantize", "stored", "tie", "initialize"]
"""``map``: a view of the file; ``copy``: read, and cast if need be; ``convert``: made from several or parts;
``quantize``: quantized on load; ``stored``: already quantized in the checkpoint; ``tie``: shares another's tensor;
``initialize``: not in the checkpoint, made by the architecture."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One parameter's line."""

    parameter: str
    action: Action
    by: str
    """The plugin that does it; ``quantdock`` for the core."""
    method: str
    """Preset or quant_method it is quantized with; empty for full precision."""
    sources: tuple[str, ...]
    stored_nbytes: int
    """Bytes it takes in the checkpoint."""
    nbytes: int
    """Bytes it takes in the loaded model, exactly; 0 when tied."""
    device: str
    note: str
    """Why it isn't quantized, what it is tied to, what let it through."""


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """Every parameter exactly once, and every stored tensor exactly once."""

    entries: tuple[Entry, ...]
    ignored: Mapping[str, str]
    """Stored tensor that isn't used -> the reason."""
    allowed: Mapping[str, str]
    """What an opt-in let through (parameter or stored tensor) -> which opt-in."""

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters in the loaded model."""
        return sum(entry.nbytes for entry in self.entries)

    @property
    def stored_nbytes(self) -> int:
        """Bytes of all stored tensors that are used."""
        return sum(entry.stored_nbytes for entry in self.entries)

    @property
    def coverage(self) -> dict[str, int]:
        """Bytes in the checkpoint by the method that they are quantized with (``""``: full precision)."""
        totals: dict[str, int] = {}
        for entry in self.entries:
            totals[entry.method] = totals.get(entry.method, 0) + entry.stored_nbytes
        return totals

    @property
    def unquantized(self) -> dict[str, int]:
        """Why what is in full precision is not quantized: reason -> bytes in the loaded model."""
        totals: dict[str, int] = {}
        for entry in self.entries:
            if not entry.method and entry.action != "tie":
                totals[entry.note] = totals.get(entry.note, 0) + entry.nbytes
        return dict(sorted(totals.items(), key=lambda item: -item[1]))
