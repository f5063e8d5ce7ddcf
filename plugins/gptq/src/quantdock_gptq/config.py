"""The data of GPTQ quantization, as ``config.json`` and ``quantize_config.json`` hold it."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch

from quantdock import ConfigError, QuantizationConfig, runtime

BITS = (2, 3, 4, 8)
FORMATS = ("gptq", "gptq_v2", "marlin")
"""Checkpoint formats that this plugin reads: zero points stored less one, and as they are, and a kernel's layout."""

_FLAGS = ("desc_act", "sym", "lm_head")
_OVERRIDES = frozenset({"bits", "group_size", "desc_act", "sym"})
_CALIBRATION = frozenset({"act_group_aware", "damp_auto_increment", "damp_percent", "mse", "static_groups"})
"""Fields that say how codes were found, and nothing about what they stand for."""
_DATA = frozenset({"batch_size", "dataset", "model_seqlen", "tokenizer"})
"""Fields of calibration data, which no checkpoint keeps."""
DAMPING = 0.05
"""``damp_percent`` where nobody says: gptqmodel's choice. transformers' is 0.1, which leaves more of the error: of
SmolLM2-135M's perplexity, 15.14 in bfloat16, 128 samples of 512 tokens make 17.96, and 18.26 with 0.1."""
_DTYPES = (None, torch.float16, torch.bfloat16, torch.float32)
_OPTIONAL = (
    *("static_groups", "act_group_aware", "damp_percent", "true_sequential", "dynamic"),
    *("modules_in_block_to_quantize", "meta", "compute_dtype"),
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the config says of one module."""

    bits: int
    group_size: int
    """Inputs per group; -1 for all."""
    desc_act: bool
    sym: bool

    def __str__(self) -> str:
        return f"{self.bits} bits (group_size={self.group_size}, desc_act={self.desc_act}, sym={self.sym})"

    def groups(self, inputs: int) -> tuple[int, int]:
        """Inputs per group, and how many groups there are."""
        size = inputs if self.group_size == -1 else self.group_size
        return size, -(-inputs // size)


@dataclass(frozen=True, kw_only=True)
class Search:
    """How codes are found for one module."""

    damp_percent: float
    """Of the Hessian's mean diagonal, added to its diagonal."""
    static_groups: bool
    """Scales come from the weights as they were; else from what earlier inputs' errors have made of them."""
    act_group_aware: bool
    """Inputs in order of their activations inside of groups, and groups in the order of their largest."""


@dataclass(frozen=True, kw_only=True)
class GPTQConfig(QuantizationConfig):
    """GPTQ in 2, 3, 4 or 8 bits; fields as gptqmodel, transformers and AutoGPTQ write them.

    Raises:
        ConfigError: a value doesn't fit; the message names the field.
    """

    quant_method: ClassVar[str] = "gptq"
    ignored_fields: ClassVar[frozenset[str]] = frozenset(
        {
            # transformers: how to calibrate, and which of its kernels to take
            *("backend", "block_name_to_quantize", "cache_block_outputs", "disable_exllama", "exllama_config"),
            *("max_input_length", "module_name_preceding_first_block", "pad_token_id", "use_cuda_fp16", "use_exllama"),
            # AutoGPTQ and gptqmodel: how to calibrate, and where the files were
            *("damp_auto_increment", "model_file_base_name", "model_name_or_path", "mse"),
            # AutoRound, which writes this format too
            *("act_bits", "act_data_type", "act_dynamic", "act_group_size", "act_sym", "amp", "autoround_version"),
            *("data_type", "enable_minmax_tuning", "enable_norm_bias_tuning", "enable_quanted_input"),
            *("gradient_accumulate_steps", "iters", "low_gpu_mem_usage", "lr", "minmax_lr", "nsamples"),
            *("quant_block_list", "scale_dtype", "seqlen", "super_bits", "super_group_size", "to_quant_block_names"),
        }
    )

    bits: int = 4
    group_size: int = 128
    """Inputs that share a scale; -1 for all of a layer."""
    desc_act: bool = False
    """Inputs were quantized by falling activation, so that a group's inputs are anywhere; ``g_idx`` says where."""
    sym: bool = True
    lm_head: bool = False
    """Whether the head is quantized, too."""
    checkpoint_format: str = "gptq"
    pack_dtype: str = "int32"
    dynamic: Mapping[str, Mapping[str, Any]] | None = None
    """Regular expressions for the start of a module's name -> what differs there. ``+:`` or nothing before it: these
    fields; ``-:``: the module isn't quantized. The first that matches counts."""
    static_groups: bool | None = None
    act_group_aware: bool | None = None
    """Taken for true where inputs are in order (``desc_act`` and ``static_groups`` are false)."""
    damp_percent: float | None = None
    """Of the Hessian's mean diagonal, added to its diagonal; 0.05 if not given. More, by 0.01 each time, where that
    isn't enough to invert it."""
    true_sequential: bool | None = None
    """Layers of a block see what the quantized layers before them make of their inputs; true if not given."""
    modules_in_block_to_quantize: Any = None
    """Lists of module names, from the block on; the rest of the linear layers isn't quantized."""
    meta: Mapping[str, Any] | None = None
    """Who made the checkpoint."""
    compute_dtype: torch.dtype | None = runtime(None)
    """What layers compute in; their input's dtype, when it is ``None``. quantdock's own field."""
    dataset: Any = field(default=None, compare=False, repr=False)
    """Samples to calibrate with: a list of texts, of token ids, or of mappings of model inputs. Without, weights are
    rounded to nearest. Not saved."""
    tokenizer: Any = field(default=None, compare=False, repr=False)
    """For texts: a tokenizer, the path of one, or ``None`` for the source's own. Not saved."""
    batch_size: int = field(default=1, compare=False)
    """Samples of equal length that go through the model together. Not saved."""
    model_seqlen: int | None = field(default=None, compare=False)
    """Tokens to which texts are cut. Not saved."""

    def __post_init__(self) -> None:
        for name in _FLAGS:
            self._expect(name, isinstance(getattr(self, name), bool), "true or false")
        _expect_sizes("GPTQConfig", {"bits": self.bits, "group_size": self.group_size})
        self._expect("checkpoint_format", isinstance(self.checkpoint_format, str), "a name")
        self._expect("pack_dtype", self.pack_dtype == "int32", "'int32'")
        damping: Any = self.damp_percent
        in_range = damping is None or (isinstance(damping, int | float) and 0 < damping < 1)
        self._expect("damp_percent", in_range, "a number between 0 and 1")
        self._expect("compute_dtype", self.compute_dtype in _DTYPES, "float16, bfloat16, float32 or none")
        for name in ("meta", "dynamic"):
            self._expect(name, isinstance(getattr(self, name), Mapping | None), "an object")
            object.__setattr__(self, name, copy.deepcopy(getattr(self, name)))
        for pattern, overrides in (self.dynamic or {}).items():
            _expect_overrides(pattern, overrides)

    def _expect(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ConfigError(f"GPTQConfig.{name} is {getattr(self, name)!r}, expected {expected}")

    def of(self, module: str) -> Settings | None:
        """What holds for a module; ``None`` when ``dynamic`` leaves it alone."""
        values = {name: getattr(self, name) for name in _OVERRIDES}
        for pattern, overrides in (self.dynamic or {}).items():
            if re.match(pattern.removeprefix("-:").removeprefix("+:"), module):
                if pattern.startswith("-:"):
                    return None
                values |= {name: value for name, value in overrides.items() if name in _OVERRIDES}
                break
        return Settings(**values)

    def search(self, module: str) -> Search:
        """How codes are found for a module that is calibrated."""
        names = ("damp_percent", "static_groups", "act_group_aware", "desc_act")
        values = {name: getattr(self, name) for name in names}
        for pattern, overrides in (self.dynamic or {}).items():
            if re.match(pattern.removeprefix("-:").removeprefix("+:"), module):
                values |= {name: value for name, value in overrides.items() if name in values}
                break
        ordered = values["desc_act"] or values["static_groups"]
        return Search(
            damp_percent=values["damp_percent"] or DAMPING,
            static_groups=bool(values["static_groups"]),
            act_group_aware=values["act_group_aware"] is not False and not ordered,
        )

    def search_as_written(self) -> dict[str, Any]:
        """The fields of how codes were found, with the defaults that were in force."""
        return dataclasses.asdict(self.search("")) | {"true_sequential": self.true_sequential is not False}

    def overridden_by(self, other: Self, asked: Collection[str] | None = None) -> Self:
        """See ``QuantizationConfig``; what a checkpoint doesn't keep isn't compared.

        Raises:
            ConfigError: calibration data for a checkpoint that is quantized already; or see there.
        """
        names = self.runtime_fields() | other.beside_defaults() if asked is None else frozenset(asked)
        given = [name for name in sorted(_DATA & other.beside_defaults()) if vars(other)[name] is not vars(self)[name]]
        idle = f"there is nothing to calibrate with {'=, '.join(given)}=" if given else ""
        try:
            result = super().overridden_by(other, names - _DATA)
        except ConfigError as error:
            raise ConfigError(f"{error} And {idle}." if idle else str(error)) from error
        if idle:
            raise ConfigError(
                f"the checkpoint is already quantized, so {idle}. Drop that, or load the unquantized checkpoint"
            )
        return result

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read the JSON object, whoever wrote it.

        The checkpoint format is called ``checkpoint_format``, ``format`` or both, and is ``gptq`` when it isn't given.

        Raises:
            ConfigError: a field is unknown or contradicts another, or a value doesn't fit; the message names it.
        """
        values = dict(data)
        method = values.pop("method", None) or "gptq"
        if method != "gptq":
            raise ConfigError(f"GPTQConfig.method is {method!r}, expected 'gptq'")
        names = {str(name).lower() for key in ("checkpoint_format", "format") if (name := values.pop(key, None))}
        if values.pop("is_marlin_format", False):
            names = names - {"gptq"} | {"marlin"}
        if len(names) > 1:
            raise ConfigError(f"GPTQConfig: checkpoint_format and format differ: {' and '.join(sorted(names))}")
        if "bits" not in values:
            raise ConfigError("GPTQConfig: bits isn't given; expected 2, 3, 4 or 8")
        if values.get("group_size", 0) is None:
            values["group_size"] = -1
        dtype = str(values.pop("pack_dtype", None) or "int32").removeprefix("torch.")
        return super().from_dict(values | {"checkpoint_format": "".join(names) or "gptq", "pack_dtype": dtype})

    def to_dict(self) -> dict[str, Any]:
        """The JSON object with the names that gptqmodel writes; what isn't known is left out."""
        values = {name: value for name, value in super().to_dict().items() if name not in _DATA}
        values |= {"method": "gptq", "format": self.checkpoint_format}
        return {
            name: copy.deepcopy(value) for name, value in values.items() if name not in _OPTIONAL or value is not None
        }


def _expect_sizes(where: str, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if (
            isinstance(value, bool)
            or not isinstance(value, int)
            or not (value > 0 or (name, value) == ("group_size", -1))
        ):
            expected = "a positive number or -1" if name == "group_size" else "2, 3, 4 or 8"
            raise ConfigError(f"{where}.{name} is {value!r}, expected {expected}")


def _expect_overrides(pattern: object, overrides: object) -> None:
    where = f"GPTQConfig.dynamic[{pattern!r}]"
    if not isinstance(pattern, str) or not isinstance(overrides, Mapping):
        raise ConfigError(f"{where} is {overrides!r}, expected an object of fields")
    try:
        re.compile(pattern.removeprefix("-:").removeprefix("+:"))
    except re.error as error:
        raise ConfigError(f"{where} is no regular expression ({error})") from error
    unknown = sorted(set(overrides) - _OVERRIDES - _CALIBRATION)
    if unknown:
        raise ConfigError(
            f"{where} has the field {unknown[0]!r}, expected some of {', '.join(sorted(_OVERRIDES | _CALIBRATION))}"
        )
    _expect_sizes(where, {name: overrides[name] for name in ("bits", "group_size") if name in overrides})
    for name in ("desc_act", "sym"):
        if not isinstance(overrides.get(name, False), bool):
            raise ConfigError(f"{where}.{name} is {overrides[name]!r}, expected true or false")
