"""The architecture of a model that is loaded from a GGUF file: another plugin's, but for the names of the tensors."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from quantdock import Architecture, Checkpoint, Routing, TensorSpec
from quantdock_gguf.config import derived_config, is_new_style
from quantdock_gguf.header import Header
from quantdock_gguf.naming import parameter_names
from quantdock_gguf.routing import ProcessorRouting

_COMPUTED = re.compile(r"(blk\.\d+\.)?(rope_freqs|rope_factors_long|rope_factors_short|attn_rot_embd)\.weight")


@dataclass(frozen=True, kw_only=True)
class GGUFCheckpoint(Checkpoint):
    """A checkpoint whose tensors have GGUF's own names."""

    headers: tuple[Header, ...]
    """Of each file, the one with the metadata first."""


class GGUFArchitecture(Architecture):
    """Routes GGUF names to parameters and leaves every other duty to the architecture that built the model."""

    def __init__(self, inner: Architecture, model: torch.nn.Module, headers: Sequence[Header]) -> None:
        self._inner = inner
        self._model = model
        self._headers = headers
        for duty in vars(Architecture):
            if not duty.startswith("_") and duty not in vars(GGUFArchitecture):
                setattr(self, duty, getattr(inner, duty))

    def route(self, stored: Mapping[str, TensorSpec], slots: Mapping[str, TensorSpec]) -> Routing:
        """By transformers' rules for its own models; a module of the user's is matched by GGUF's names as they are."""
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

        if not hasattr(getattr(self._model, "config", None), "model_type"):
            return self._inner.route(stored, slots)
        architecture = self._headers[0].architecture
        if is_new_style(architecture):
            return self._route_by_transforms(architecture, stored, slots)
        # The processor gets the config that the file gives, whatever the model was built with: it undoes what was
        # done to the file.
        processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=derived_config(self._headers))
        names = parameter_names(self._model, processor, self._headers)
        return ProcessorRouting(processor=processor, names=names).route(stored, slots)

    def may_be_unexpected(self, stored: str, target: str) -> str | None:
        """What llama.cpp's converters add to a file, and whatever else the inner architecture can do without."""
        if _COMPUTED.fullmatch(stored):
            return "rotary factors, which transformers computes from the config instead"
        return self._inner.may_be_unexpected(stored, target)

    def _route_by_transforms(
        self, architecture: str, stored: Mapping[str, TensorSpec], slots: Mapping[str, TensorSpec]
    ) -> Routing:
        from transformers.integrations.gguf import get_gguf_conversion_mapping

        from quantdock_transformers.conversions import route

        config = self._model.config
        # The operations are for values as they are stored and casting comes last: a norm is stored as ``1 + w``, and
        # rounding that first would cost most of the digits of ``w``.
        wide = {name: dataclasses.replace(slot, dtype=torch.float32) for name, slot in slots.items()}
        return route(
            get_gguf_conversion_mapping(architecture, config),
            stored,
            wide,
            config=config,
            base_model_prefix=str(getattr(self._model, "base_model_prefix", "")),
        )
