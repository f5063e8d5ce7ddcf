"""Which parameter a GGUF tensor is: transformers' rule, with its table of names built once instead of per module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from gguf import MODEL_ARCH_NAMES, TensorNameMap, get_tensor_name_map

from quantdock_gguf.header import Header

if TYPE_CHECKING:
    from transformers.modeling_gguf_pytorch_utils import TensorProcessor


def parameter_names(model: torch.nn.Module, processor: TensorProcessor, headers: Sequence[Header]) -> dict[str, str]:
    """GGUF name -> parameter name, for whatever of ``model`` the GGUF conventions have a name for.

    The same as ``get_gguf_hf_weights_map(model, processor)``. That function asks for a new table of names for every
    module of the model, which takes it 10 s for 30 layers. The table here is that of the file's architecture, where
    transformers guesses it from the model type (and finds none for ``mistral``).
    """
    header = headers[0]
    architecture = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == header.architecture)
    return _names(model, processor, get_tensor_name_map(architecture, _blocks(headers)), "")


def _names(module: torch.nn.Module, processor: TensorProcessor, table: TensorNameMap, prefix: str) -> dict[str, str]:
    """The names of one module and what is below it: a name that is found nearer to the root wins."""
    found: dict[str, str] = {}
    for own_name in module.state_dict():
        key = processor.preprocess_name(own_name)
        name, dot, leaf = key.rpartition(".")
        if not dot or leaf not in ("weight", "bias"):
            name, dot, leaf = key, "", ""
        stored = table.get_name(name)
        if stored is None:
            # Writes what it knows into ``found``; fused experts are one parameter and several tensors.
            processor.perform_fallback_tensor_mapping(found, dot + leaf, prefix, key)
        else:
            found[stored + dot + leaf] = prefix + key
    for name, child in module.named_children():
        for stored, parameter in _names(child, processor, table, f"{prefix}{name}.").items():
            found.setdefault(stored, parameter)
    return found


def _blocks(headers: Sequence[Header]) -> int:
    """How many layers the table of names must have; a damaged count can't exceed the number of tensors."""
    header, most = headers[0], sum(len(part.tensors) for part in headers)
    keys = (f"{header.architecture}.{key}" for key in ("block_count", "decoder_block_count"))
    counts = [count for key in keys if isinstance(count := header.metadata.get(key), int)]
    return min(max(counts, default=most), most)
