"""quantdock loads pretrained checkpoints into PyTorch models and quantizes them while they load.

Every public name is importable from here and nowhere else. Names are resolved on first use, so that ``import
quantdock`` imports neither torch nor any plugin.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOMES = {
    "architecture": ("Architecture", "Blocks", "Chatter", "LoadOutcome", "Routing", "Skeleton"),
    "auto": (
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoModelForImageTextToText",
        "AutoModelForMaskedLM",
        "AutoModelForQuestionAnswering",
        "AutoModelForSeq2SeqLM",
        "AutoModelForSequenceClassification",
        "AutoModelForTokenClassification",
    ),
    "calibration.block": ("CalibrationBlock",),
    "calibration.data": ("Calibration",),
    "calls": ("load", "plan"),
    "checkpoint": ("Checkpoint",),
    "config": ("ModelConfig", "read_json_object"),
    "conversion": ("Assembly", "Conversion", "Piece", "rename"),
    "errors": (
        "CalibrationError",
        "CheckpointError",
        "ConfigError",
        "LedgerError",
        "LoadError",
        "PatternError",
        "PlacementError",
        "PluginConflictError",
        "PluginError",
        "PolicyError",
        "QuantdockError",
        "SaveError",
        "SourceError",
        "UnknownMethodError",
        "UnknownPresetError",
        "UnsupportedError",
    ),
    "hookspecs": ("hookimpl",),
    "inspecting": ("Inspection", "inspect"),
    "layout": ("Capabilities", "Layout", "Slices"),
    "options": ("LoadOptions",),
    "planning": ("Plan",),
    "quantizer": ("QuantizationConfig", "Quantizer", "runtime"),
    "registry": ("presets", "quantizers"),
    "reporting": ("Report", "report"),
    "saving": ("dequantize", "save"),
    "skipping": ("SkipList",),
    "source": ("Source",),
    "standalone": ("StandaloneConfig",),
    "tensors": ("Parameter", "StoredTensor", "TensorReader", "TensorSpec"),
    "threads": ("caller_threads",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Architecture",
    "Assembly",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForMaskedLM",
    "AutoModelForQuestionAnswering",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "Blocks",
    "Calibration",
    "CalibrationBlock",
    "CalibrationError",
    "Capabilities",
    "Chatter",
    "Checkpoint",
    "CheckpointError",
    "ConfigError",
    "Conversion",
    "Inspection",
    "Layout",
    "LedgerError",
    "LoadError",
    "LoadOptions",
    "LoadOutcome",
    "ModelConfig",
    "Parameter",
    "PatternError",
    "Piece",
    "PlacementError",
    "Plan",
    "PluginConflictError",
    "PluginError",
    "PolicyError",
    "QuantdockError",
    "QuantizationConfig",
    "Quantizer",
    "Report",
    "Routing",
    "SaveError",
    "Skeleton",
    "SkipList",
    "Slices",
    "Source",
    "SourceError",
    "StandaloneConfig",
    "StoredTensor",
    "TensorReader",
    "TensorSpec",
    "UnknownMethodError",
    "UnknownPresetError",
    "UnsupportedError",
    "caller_threads",
    "dequantize",
    "hookimpl",
    "inspect",
    "load",
    "plan",
    "presets",
    "quantizers",
    "read_json_object",
    "rename",
    "report",
    "runtime",
    "save",
]

if TYPE_CHECKING:
    from quantdock.architecture import Architecture, Blocks, Chatter, LoadOutcome, Routing, Skeleton
    from quantdock.auto import (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForMaskedLM,
        AutoModelForQuestionAnswering,
        AutoModelForSeq2SeqLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    )
    from quantdock.calibration.block import CalibrationBlock
    from quantdock.calibration.data import Calibration
    from quantdock.calls import load, plan
    from quantdock.checkpoint import Checkpoint
    from quantdock.config import ModelConfig, read_json_object
    from quantdock.conversion import Assembly, Conversion, Piece, rename
    from quantdock.errors import (
        CalibrationError,
        CheckpointError,
        ConfigError,
        LedgerError,
        LoadError,
        PatternError,
        PlacementError,
        PluginConflictError,
        PluginError,
        PolicyError,
        QuantdockError,
        SaveError,
        SourceError,
        UnknownMethodError,
        UnknownPresetError,
        UnsupportedError,
    )
    from quantdock.hookspecs import hookimpl
    from quantdock.inspecting import Inspection, inspect
    from quantdock.layout import Capabilities, Layout, Slices
    from quantdock.options import LoadOptions
    from quantdock.planning import Plan
    from quantdock.quantizer import QuantizationConfig, Quantizer, runtime
    from quantdock.registry import presets, quantizers
    from quantdock.reporting import Report, report
    from quantdock.saving import dequantize, save
    from quantdock.skipping import SkipList
    from quantdock.source import Source
    from quantdock.standalone import StandaloneConfig
    from quantdock.tensors import Parameter, StoredTensor, TensorReader, TensorSpec
    from quantdock.threads import caller_threads


def __getattr__(name: str) -> object:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'quantdock' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"quantdock.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
