"""What quantdock's loader must know about a transformers model, asked of the model itself."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from quantdock import Architecture, Blocks, Chatter, LoadOutcome, Quantizer, Routing, Source, TensorSpec
from quantdock_transformers.conversions import route
from quantdock_transformers.experts import modular
from quantdock_transformers.recognition import forget, mark


class TransformersArchitecture(Architecture):
    """A ``PreTrainedModel`` on the meta device and its rules: conversions, ties, fp32 modules, initialisation."""

    def __init__(self, model: Any, dtype: torch.dtype, *, generation_config: Any = None, is_part: bool = False) -> None:
        self._model = model
        self._is_part = is_part  # a text model out of a composite checkpoint
        self._generation_config = generation_config
        self._fp32 = [
            (re.compile(pattern.replace("*", ".*")), wanted) for pattern, wanted in model._get_dtype_plan(dtype).items()
        ]
        self._unexpected = _patterns(model._keys_to_ignore_on_load_unexpected)
        self._missing = _patterns(model._keys_to_ignore_on_load_missing)
        self._buffers = [name for name, _ in model.named_buffers()]
        self._transforms: list[Any] | None = None
        self._modular: list[Any] = []
        self._other_parts: set[str] = set()

    def route(self, stored: Mapping[str, TensorSpec], slots: Mapping[str, TensorSpec]) -> Routing:
        from transformers.conversion_mapping import get_model_conversion_mapping

        self._transforms = get_model_conversion_mapping(self._model)
        self._modular = modular(self._transforms)
        routing = route(
            self._transforms,
            stored,
            slots,
            config=self._model.config,
            base_model_prefix=self._model.base_model_prefix,
            modular=self._modular,
        )
        if self._is_part:
            matched = [source for conversion in routing.conversions for source in conversion.sources]
            self._other_parts = other_parts(routing.unmatched, matched)
        return routing

    def role(self, module: torch.nn.Module, leaf: str) -> Any:
        from transformers.pytorch_utils import Conv1D

        if leaf == "weight" and isinstance(module, Conv1D):
            return "linear-transposed"
        return super().role(module, leaf)

    def dtype(self, name: str) -> torch.dtype | None:
        return next((wanted for pattern, wanted in self._fp32 if pattern.search(name)), None)

    def tied(self) -> Mapping[str, str]:
        return dict(self._model.all_tied_weights_keys)

    def kept(self) -> Mapping[str, str]:
        from transformers.quantizers.base import get_keys_to_not_convert
        from transformers.quantizers.quantizers_utils import should_convert_module

        tied = set(self._model.all_tied_weights_keys) | set(self._model.all_tied_weights_keys.values())
        head = self._model.get_output_embeddings()
        keys = [*get_keys_to_not_convert(self._model), *(self._model._keep_in_fp32_modules or ())]
        result = {}
        for name in self._model.state_dict():
            path = name.rpartition(".")[0]
            if name in tied:
                result[name] = "tied"
            elif not should_convert_module(path, keys):
                is_head = head is not None and self._model.get_submodule(path) is head
                result[name] = "output head" if is_head else "kept in full precision by the architecture"
        return result

    def may_be_missing(self, name: str) -> str | None:
        return "the architecture computes it" if _any(self._missing, name) else None

    def may_be_unexpected(self, stored: str, target: str) -> str | None:
        if _any(self._unexpected, target):
            return "the architecture ignores it"
        if stored in self._other_parts:
            return "belongs to a part of the composite model that this task doesn't use"
        # Buffers that older checkpoints store and newer classes recompute.
        if re.search(r"rotary_emb\.inv_freq", target) and any(b.endswith("rotary_emb.inv_freq") for b in self._buffers):
            return "a rotary buffer, which the model computes"
        if re.search(r"(^|\.)position_ids$", target) and any(b.endswith("position_ids") for b in self._buffers):
            return "position ids, which the model computes"
        return None

    def is_head(self, name: str) -> bool:
        prefix = self._model.base_model_prefix
        return bool(prefix) and hasattr(self._model, prefix) and not name.startswith(f"{prefix}.")

    def no_split_modules(self) -> Sequence[str]:
        return sorted(self._model._no_split_modules or ())

    def dispatch_options(self) -> Mapping[str, Any]:
        return {"skip_keys": self._model._skip_keys_device_placement}

    def blocks(self, model: torch.nn.Module) -> Blocks:
        config = self._model.config.get_text_config(decoder=True)
        caches = "use_cache" in inspect.signature(self._model.forward).parameters
        return dataclasses.replace(
            super().blocks(model),
            arguments={"use_cache": False} if caches else {},
            max_positions=getattr(config, "max_position_embeddings", None),
            hidden_size=getattr(config, "hidden_size", None),
        )

    def tokenize(self, texts: Sequence[str], tokenizer: Any, source: Source) -> list[list[int]]:
        from quantdock_transformers.tokenizing import token_ids

        return token_ids(texts, tokenizer, source)

    def finish(self, outcome: LoadOutcome) -> None:
        from transformers.utils.loading_report import LoadStateDictInfo

        model = self._model
        _mark_initialised(model, outcome)
        info = LoadStateDictInfo(
            missing_keys={*outcome.missing, *outcome.tied},
            unexpected_keys=set(),
            mismatched_keys=set(),
            error_msgs=[],
            conversion_errors={},
            skipped_pp_keys=set(),
        )
        model.mark_tied_weights_as_initialized(info)
        devices = {name: str(device) for name, device in outcome.devices.items()}
        model._move_missing_keys_from_meta_to_device(info.missing_and_mismatched(), devices, None, None)
        model._initialize_missing_keys(bool(outcome.quantizers))
        model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
        if self._generation_config is not None:
            model.generation_config = self._generation_config
        if self._transforms is not None:
            # What save_pretrained undoes: the conversions that this checkpoint needed. A checkpoint of another format
            # was routed by its own plugin, and is saved as transformers saves the architecture.
            transforms = [*self._transforms, *self._modular]
            model._weight_conversions = [transform for transform in transforms if transform.was_used()]
        if not any(map(_has_pieces, outcome.quantizers)):
            self._leave_modular_names()
        if outcome.quantization_config is not None:
            mark(model, outcome.quantizers, outcome.quantization_config)

    def export(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        from transformers.core_model_loading import revert_weight_conversion
        from transformers.modeling_utils import remove_tied_weights_from_state_dict

        for name in self._model._keys_to_ignore_on_save or ():
            state.pop(name, None)
        return dict(revert_weight_conversion(self._model, remove_tied_weights_from_state_dict(state, self._model)))

    def forget_quantization(self) -> None:
        forget(self._model)
        self._leave_modular_names()

    def _leave_modular_names(self) -> None:
        """Save experts as transformers saves the architecture: under modular names they are read quantized, and in full
        precision only here."""
        if any(transform.was_used() for transform in self._modular):
            self._model._weight_conversions = None

    def chatter(self, source: Source) -> Chatter | None:
        from quantdock_transformers.chatting import open_chat

        return open_chat(self._model, source)

    def write_config(self, folder: Path, quantization: Mapping[str, Any] | None) -> None:
        model = self._model
        model.config.dtype = str(model.dtype).removeprefix("torch.")
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        if quantization is not None:
            _complete(folder / "config.json", quantization)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)


def _has_pieces(quantizer: Quantizer[Any]) -> bool:
    return any(map(quantizer.stored_in_pieces, quantizer.parameters.values()))


def _complete(path: Path, quantization: Mapping[str, Any]) -> None:
    """Add to a saved config what transformers' class for the method has no field for (GPTQ's ``dynamic``, for one)."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["quantization_config"] = {**quantization, **config.get("quantization_config", {})}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def other_parts(unmatched: Iterable[str], matched: Iterable[str]) -> set[str]:
    """Which unmatched names lie outside of the part of a composite checkpoint that the matched names make up.

    A name is outside when no matched name shares its first component (``vision_tower.x`` beside ``language_model.y``),
    or its first two where all matched names under the first share one second (``model.visual.x`` beside
    ``model.language_model.y``). Anything deeper is inside, and would be a tensor that got lost.
    """
    inside: dict[str, set[str]] = {}
    for name in matched:
        first, _, rest = name.partition(".")
        inside.setdefault(first, set()).add(rest.partition(".")[0])
    result = set()
    for name in unmatched:
        first, _, rest = name.partition(".")
        seconds = inside.get(first)
        if seconds is None or (len(seconds) == 1 and rest.partition(".")[0] not in seconds):
            result.add(name)
    return result


def _patterns(patterns: Iterable[str] | None) -> list[re.Pattern[str]]:
    return [re.compile(pattern) for pattern in patterns or ()]


def _any(patterns: Iterable[re.Pattern[str]], name: str) -> bool:
    return any(pattern.search(name) for pattern in patterns)


def _mark_initialised(model: Any, outcome: LoadOutcome) -> None:
    """Set transformers' flag on what has its values, so that its initialisation leaves it alone."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in outcome.loaded:
        path, _, leaf = name.rpartition(".")
        tensor = getattr(modules.get(path), leaf, None)
        if isinstance(tensor, torch.Tensor):
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    unfinished = {name.rpartition(".")[0] for name in outcome.missing}
    for quantizer in outcome.quantizers:
        for parameter in quantizer.parameters.values():
            if parameter.module not in unfinished:
                modules[parameter.module].__dict__["_is_hf_initialized"] = True  # past nn.Module, which takes its time
                _mark_around(modules, parameter.module, unfinished)


def _mark_around(modules: Mapping[str, Any], path: str, unfinished: Iterable[str]) -> None:
    """Set the flag on the modules around a quantized one, too: some initialise the weights of their children (GPT-2's
    attention does), which aren't there under that name any more. Not on the model, on one that owns buffers that have
    to be made anew, or around something that is to be initialised."""
    while path := path.rpartition(".")[0]:
        module = modules[path]
        if module.__dict__.get("_is_hf_initialized") or module._non_persistent_buffers_set:
            return
        if any(f"{other}.".startswith(f"{path}.") for other in unfinished):
            return
        module.__dict__["_is_hf_initialized"] = True
