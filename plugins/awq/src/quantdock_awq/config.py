"""The data of AWQ quantization, as ``config.json`` and ``quant_config.json`` hold it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch

from quantdock import ConfigError, QuantizationConfig, runtime

VERSIONS = ("gemm", "gemv", "gemv_fast", "llm-awq")
"""Forms of the tensors on disk."""

_GEMM_TOO = ("exllama", "exllamav2", "exllama_v1", "exllama_v2", "gemm_triton", "ipex", "machete", "marlin")
"""Versions that name a kernel, and whose tensors on disk are those of ``gemm``."""
_AUTOAWQ = {"w_bit": "bits", "q_group_size": "group_size"}
_UNSAVED = ("dataset", "tokenizer", "batch_size", "max_length")
_OPTIONAL = ("compute_dtype", "dynamic", "meta")
_DTYPES = (None, torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, kw_only=True)
class AwqConfig(QuantizationConfig):
    """AWQ in 4 bits; fields as AutoAWQ, gptqmodel and transformers write them.

    Raises:
        ConfigError: a value doesn't fit; the message names the field.
    """

    quant_method: ClassVar[str] = "awq"
    ignored_fields: ClassVar[frozenset[str]] = frozenset(
        {
            # AutoAWQ: what it fused after loading, and which of its kernels it took
            *("backend", "do_fuse", "exllama_config", "fuse_max_seq_len", "modules_to_fuse"),
            # transformers, whose class inherits the fields of GPTQ's
            *("act_group_aware", "block_name_to_quantize", "cache_block_outputs", "damp_percent", "desc_act"),
            *("max_input_length", "model_seqlen", "module_name_preceding_first_block", "modules_in_block_to_quantize"),
            *("pad_token_id", "sym", "true_sequential"),
            # gptqmodel: how to calibrate, and what is the same for all of AWQ
            *("damp_auto_increment", "lm_head", "mse", "pack_dtype", "static_groups"),
        }
    )

    bits: int = 4
    group_size: int = 128
    """Inputs that share a scale; -1 for all of a layer."""
    zero_point: bool = True
    """Whether groups have zero points; without, weights are symmetric."""
    version: str = "gemm"
    """One of ``VERSIONS``; names of kernels that read the tensors of ``gemm`` become that."""
    modules_to_not_convert: Sequence[str] | None = None
    """Modules that aren't quantized, matched as ``quantdock.SkipList`` says. Of a checkpoint, the tensors tell."""
    dynamic: Mapping[str, Any] | None = None
    """gptqmodel's overrides. They are kept; that a checkpoint's tensors agree with the other fields is checked."""
    meta: Mapping[str, Any] | None = None
    """Who made the checkpoint."""
    compute_dtype: torch.dtype | None = runtime(None)
    """What layers compute in; their input's dtype, when it is ``None``. quantdock's own field."""
    dataset: Any = field(default=None, compare=False, repr=False)
    """Calibration data: texts, token ids, or model inputs (see ``quantdock.Calibration``); never saved."""
    tokenizer: Any = field(default=None, compare=False, repr=False)
    """For texts: a tokenizer, the path of one, or ``None`` for the model's own; never saved."""
    batch_size: int = field(default=1, compare=False, repr=False)
    """Samples of equal length that are run together; never saved."""
    max_length: int | None = field(default=None, compare=False, repr=False)
    """Tokens of a text at most; never saved."""

    def __post_init__(self) -> None:
        for name in ("bits", "group_size"):
            value = getattr(self, name)
            fits = type(value) is int and (value > 0 or (name, value) == ("group_size", -1))
            self._expect(name, fits, "a positive number or -1" if name == "group_size" else "4")
        self._expect("zero_point", isinstance(self.zero_point, bool), "true or false")
        self._expect("version", isinstance(self.version, str), "a name")
        object.__setattr__(self, "version", _plain_version(self.version))
        entries = self.modules_to_not_convert
        if entries is not None:
            are_names = isinstance(entries, list | tuple) and all(isinstance(entry, str) for entry in entries)
            self._expect("modules_to_not_convert", are_names, "a list of names")
            object.__setattr__(self, "modules_to_not_convert", list(entries))
        for name in ("dynamic", "meta"):
            self._expect(name, isinstance(getattr(self, name), Mapping | None), "an object")
            object.__setattr__(self, name, copy.deepcopy(getattr(self, name)))
        self._expect("compute_dtype", self.compute_dtype in _DTYPES, "float16, bfloat16, float32 or none")

    def _expect(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ConfigError(f"AwqConfig.{name} is {getattr(self, name)!r}, expected {expected}")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read the JSON object, whoever wrote it.

        AutoAWQ's own file says ``w_bit`` and ``q_group_size``. The form is called ``version``, ``format`` or
        ``checkpoint_format``, and is ``gemm`` when it isn't given; a ``backend`` of ``llm-awq`` says it, too.

        Raises:
            ConfigError: a field is unknown or contradicts another, or a value doesn't fit; the message names it.
        """
        values = dict(data)
        method = values.pop("method", None) or "awq"
        if method != "awq":
            raise ConfigError(f"AwqConfig.method is {method!r}, expected 'awq'")
        for old, new in _AUTOAWQ.items():
            if old in values and values.setdefault(new, values[old]) != values.pop(old):
                raise ConfigError(f"AwqConfig: {old} and {new} differ: {data[old]!r} and {data[new]!r}")
        names = [values.pop(key, None) for key in ("version", "format", "checkpoint_format")]
        found = {_plain_version(str(getattr(name, "value", name))) for name in names if name}
        if str(getattr(values.get("backend"), "value", values.get("backend"))) == "llm-awq":
            found = {"llm-awq"}
        if len(found) > 1:
            raise ConfigError(f"AwqConfig: version, format and checkpoint_format differ: {' and '.join(sorted(found))}")
        if values.get("group_size", 0) is None:
            values["group_size"] = -1
        if values.get("batch_size", 0) is None:
            del values["batch_size"]
        return super().from_dict(values | {"version": "".join(found) or "gemm"})

    def to_dict(self) -> dict[str, Any]:
        """The JSON object with the names that AutoAWQ and transformers know; what isn't known is left out."""
        return {
            name: copy.deepcopy(value)
            for name, value in super().to_dict().items()
            if name not in _UNSAVED and (name not in _OPTIONAL or value is not None)
        }


def _plain_version(name: str) -> str:
    name = name.lower()
    return "gemm" if name in _GEMM_TOO else name
