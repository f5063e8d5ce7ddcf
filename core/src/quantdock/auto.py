"""Drop-in classes: transformers' ``from_pretrained`` with quantdock behind it.

``from quantdock import AutoModelForCausalLM`` instead of ``from transformers import ...`` is all that a user changes.
What comes back is the architecture's own class.
"""

from __future__ import annotations

import os
import warnings
from typing import Any, ClassVar

import torch

from quantdock.calls import load
from quantdock.errors import ConfigError
from quantdock.matching import NEW_HEAD
from quantdock.reporting import report

_SAME = {
    "cache_dir",
    "force_download",
    "local_files_only",
    "token",
    "revision",
    "variant",
    "device_map",
    "max_memory",
    "ignore_mismatched_sizes",
    "config",
    "trust_remote_code",
    "attn_implementation",
    # quantdock's own, beside transformers'
    "memory_budget",
    "workers",
    "skip",
    "allow_missing",
    "ignore_unexpected",
    "policy",
    "plugins",
    "progress",
    "cache",
}
_RENAMED = {"quantization_config": "quantize", "offload_folder": "offload_dir"}
_WITHOUT_EFFECT = {"low_cpu_mem_usage", "_fast_init", "offload_state_dict", "weights_only"}


class _AutoClass:
    task: ClassVar[str]

    def __init__(self) -> None:
        raise TypeError(f"use {type(self).__name__}.from_pretrained(source, ...)")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        use_safetensors: bool | None = None,
        gguf_file: str | None = None,
        load_in_4bit: bool = False,
        load_in_8bit: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load with transformers' arguments; see transformers' ``from_pretrained`` for what they mean.

        ``quantization_config`` also takes a preset's name or an object as in ``config.json``. Arguments that are
        attributes of the model's config override it, as there. One thing is looser than ``quantdock.load``: a task
        head that the checkpoint doesn't have is initialised, with a warning.

        Raises:
            ConfigError: an argument is known to transformers but not supported here; it is never ignored.
        """
        if load_in_4bit or load_in_8bit:
            raise ConfigError("load_in_4bit and load_in_8bit are gone; pass quantization_config= a preset or a config")
        arguments = {name: kwargs.pop(name) for name in _SAME & kwargs.keys()}
        arguments |= {ours: kwargs.pop(name) for name, ours in _RENAMED.items() if name in kwargs}
        for name in _WITHOUT_EFFECT & kwargs.keys():
            kwargs.pop(name)
        extras: dict[str, Any] = {"allow_new_head": True, "config_arguments": kwargs}
        if gguf_file is not None:
            extras["gguf_file"] = gguf_file
        settled = dtype if dtype is not None else torch_dtype
        model = load(
            pretrained_model_name_or_path,
            task=cls.task,
            dtype="auto" if settled is None else settled,
            use_safetensors=use_safetensors is not False,
            extras=extras,
            **arguments,
        )
        new = [name for name, reason in report(model).ledger.allowed.items() if reason == NEW_HEAD]
        if new:
            warnings.warn(
                f"the checkpoint has no {', '.join(new)}; initialised anew, to be trained before use", stacklevel=2
            )
        return model


class AutoModel(_AutoClass):
    """The base model, without a head."""

    task = "base"


class AutoModelForCausalLM(_AutoClass):
    """Text generation."""

    task = "causal-lm"


class AutoModelForSeq2SeqLM(_AutoClass):
    """Encoder-decoder text generation."""

    task = "seq2seq-lm"


class AutoModelForMaskedLM(_AutoClass):
    """Filling in masked tokens."""

    task = "masked-lm"


class AutoModelForSequenceClassification(_AutoClass):
    """Classifying texts."""

    task = "sequence-classification"


class AutoModelForTokenClassification(_AutoClass):
    """Classifying tokens."""

    task = "token-classification"


class AutoModelForQuestionAnswering(_AutoClass):
    """Finding answers in a text."""

    task = "question-answering"


class AutoModelForImageTextToText(_AutoClass):
    """Text from images and text."""

    task = "image-text-to-text"
