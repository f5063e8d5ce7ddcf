"""The architecture of a model that is loaded from a GGUF file: another plugin's, but for the names of the tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantdock import Architecture, Checkpoint, LoadOutcome, Routing, TensorSpec
from quantdock_gguf.config import derived_config, is_new_style
from quantdock_gguf.header import Header

_COMPUTED = re.compile(r"(blk\.\d+\.)?(rope_freqs|rope_factors_long|rope_factors_short|attn_rot_embd)\.weight")


@dataclass(frozen=True, kw_only=True)
class GGUFCheckpoint(Checkpoint):
    """A checkpoint whose tensors have GGUF's own names."""

    headers: tuple[Header, ...]
    """Of each file, the one with the metadata first."""


class GGUFArchitecture(Architecture):
    """Routes GGUF names to parameters and leaves everything else to the architecture that built the model."""

    def __init__(self, inner: Architecture, model: torch.nn.Module, headers: Sequence[Header]) -> None:
        self.inner = inner
        self._model = model
        self._headers = headers

    def route(self, stored: Mapping[str, TensorSpec], slots: Mapping[str, TensorSpec]) -> Routing:
        """By transformers' rules for its own models; a module of the user's is matched by GGUF's names as they are."""
        if not hasattr(getattr(self._model, "config", None), "model_type"):
            return self.inner.route(stored, slots)
        architecture = self._headers[0].architecture
        if is_new_style(architecture):
            return self._route_by_transforms(architecture, stored, slots)
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

        from quantdock_gguf.naming import parameter_names
        from quantdock_gguf.routing import ProcessorRouting

        # The processor gets the config that the file gives, whatever the model was built with: it undoes what was
        # done to the file.
        processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=derived_config(self._headers))
        names = parameter_names(self._model, processor, self._headers)
        return ProcessorRouting(processor=processor, names=names).route(stored, slots)

    def may_be_unexpected(self, stored: str, target: str) -> str | None:
        if _COMPUTED.fullmatch(stored):
            return "rotary factors, which transformers computes from the config instead"
        return self.inner.may_be_unexpected(stored, target)

    def _route_by_transforms(
        self, architecture: str, stored: Mapping[str, TensorSpec], slots: Mapping[str, TensorSpec]
    ) -> Routing:
        from transformers.integrations.gguf import get_gguf_conversion_mapping

        from quantdock_transformers import conversions

        config = self._model.config
        routing: Routing = conversions.route(
            get_gguf_conversion_mapping(architecture, config),
            stored,
            slots,
            self._model,
            config,
            getattr(self._model, "base_model_prefix", ""),
        )
        return routing

    # Everything below is the inner architecture's.

    def role(self, module: torch.nn.Module, leaf: str) -> Any:
        return self.inner.role(module, leaf)

    def dtype(self, name: str) -> torch.dtype | None:
        return self.inner.dtype(name)

    def tied(self) -> Mapping[str, str]:
        return self.inner.tied()

    def kept(self) -> Mapping[str, str]:
        return self.inner.kept()

    def may_be_missing(self, name: str) -> str | None:
        return self.inner.may_be_missing(name)

    def is_head(self, name: str) -> bool:
        return self.inner.is_head(name)

    def no_split_modules(self) -> Sequence[str]:
        return self.inner.no_split_modules()

    def dispatch_options(self) -> Mapping[str, Any]:
        return self.inner.dispatch_options()

    def finish(self, outcome: LoadOutcome) -> None:
        self.inner.finish(outcome)

    def export(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self.inner.export(state)

    def write_config(self, folder: Path, quantization: Mapping[str, Any] | None) -> None:
        self.inner.write_config(folder, quantization)
