"""What quantdock raises. Every message says what was found, what was expected, where, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


class QuantdockError(Exception):
    """Base of everything quantdock raises on purpose."""


class SourceError(QuantdockError):
    """The source a user named can't be found, reached or used."""


class ConfigError(QuantdockError):
    """A ``config.json``, a quantization config or an option is missing, broken or contradictory."""


class CheckpointError(QuantdockError):
    """A weight file or its index is damaged, incomplete or hostile.

    Attributes:
        file: the file at fault, if one can be named.
        tensor: the stored tensor at fault, if one can be named.
    """

    def __init__(self, message: str, *, file: Path | str | None = None, tensor: str | None = None) -> None:
        where = "".join((f"{file}: " if file is not None else "", f"tensor {tensor!r}: " if tensor is not None else ""))
        super().__init__(where + message)
        self.file = None if file is None else Path(file)
        self.tensor = tensor


class LedgerError(QuantdockError):
    """The ledger of a load doesn't balance; every problem that was found is listed.

    Attributes:
        problems: one sentence per problem, each naming its parameter or stored tensor.
    """

    shown = 40

    def __init__(self, summary: str, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        lines = [f"  - {problem}" for problem in self.problems[: self.shown]]
        if len(self.problems) > self.shown:
            lines.append(f"  ... and {len(self.problems) - self.shown} more (the exception's .problems has them all)")
        super().__init__("\n".join([summary, *lines]))


class PatternError(QuantdockError):
    """A pattern that was given (skip, quantize, allow_missing, ignore_unexpected) matches nothing."""


class UnsupportedError(QuantdockError):
    """This method can't do what was asked on this hardware, with this parameter or in this combination."""


class PluginError(QuantdockError):
    """A plugin that a load needs is broken or breaks its contract; names the plugin."""


class PluginConflictError(PluginError):
    """Two distributions claim the same name; names both."""


class UnknownMethodError(QuantdockError):
    """No installed plugin serves a ``quant_method``."""


class UnknownPresetError(QuantdockError):
    """No installed plugin offers a preset."""


class PolicyError(QuantdockError):
    """The policy of this machine's owner refuses something, or can't be read."""


class PlacementError(QuantdockError):
    """The model can't be placed on the devices that were named."""


class LoadError(QuantdockError):
    """A unit failed while it was read, converted, quantized or placed.

    Attributes:
        parameter: the parameter that was being made.
        stored: the stored tensors it is made of.
        file: the file that was read.
        plugin: the plugin at work, ``None`` when it was the core.
    """

    def __init__(
        self, message: str, *, parameter: str, stored: Sequence[str], file: Path | None, plugin: str | None
    ) -> None:
        tensors = ", ".join(stored[:4]) + (f", ... ({len(stored)} in all)" if len(stored) > 4 else "")
        super().__init__(
            f"{message}\n  parameter: {parameter}\n  stored tensors: {tensors}\n  file: {file}\n"
            f"  at work: {plugin or 'quantdock'}"
        )
        self.parameter = parameter
        self.stored = tuple(stored)
        self.file = file
        self.plugin = plugin


class CalibrationError(QuantdockError):
    """Calibration data doesn't fit, a model can't be run block by block, or its activations can't be used.

    Attributes:
        block: path of the block that was being calibrated, if it got that far.
        parameter: the parameter at fault, if one can be named.
    """

    def __init__(self, message: str, *, block: str | None = None, parameter: str | None = None) -> None:
        where = "".join(f"\n  {name}: {value}" for name, value in (("block", block), ("parameter", parameter)) if value)
        super().__init__(message + where)
        self.block = block
        self.parameter = parameter


class SaveError(QuantdockError):
    """A model can't be saved; nothing was written."""
