"""The config of a model, from the metadata of its GGUF file, as transformers derives it."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType

from quantdock import ConfigError, ModelConfig
from quantdock_gguf.header import ALIGNMENT, MAGIC, STRING, Header

_VOCABULARY = "tokenizer.ggml.tokens"
_LARGEST_DIGEST = 1 << 20
# What transformers calls an architecture, where GGUF files spell it differently.
_SPELLINGS = {
    "gpt_oss": ("gpt-oss",),
    "minimax_m2": ("minimax-m2",),
    "qwen2_moe": ("qwen2moe",),
    "qwen3_moe": ("qwen3moe",),
    "t5": ("t5", "t5encoder"),
}


def supported_architectures() -> list[str]:
    """The ``general.architecture`` values that the installed transformers can make a config for."""
    from transformers.integrations.gguf import GGUF_CONFIG_ARCHS
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    legacy = (spelling for name in GGUF_SUPPORTED_ARCHITECTURES for spelling in _SPELLINGS.get(name, (name,)))
    # The table of transformers has entries that are no architectures (``general``, ``tokenizer``).
    return sorted({*GGUF_CONFIG_ARCHS, *(name for name in legacy if name in MODEL_ARCH_NAMES.values())})


def is_new_style(architecture: str) -> bool:
    """Whether transformers describes this architecture by weight transforms instead of a tensor processor."""
    from transformers.integrations.gguf import GGUF_CONFIG_ARCHS

    return architecture in GGUF_CONFIG_ARCHS


def model_config(headers: Sequence[Header]) -> ModelConfig:
    """The config that transformers derives from the first header, and the dtype it would load the model in.

    Args:
        headers: of all files of the checkpoint, the one with the metadata first.

    Raises:
        ConfigError: the architecture is one that transformers has no mapping for, or its metadata is incomplete.
    """
    header = headers[0]
    architecture = header.architecture
    if architecture not in (supported := supported_architectures()):
        raise ConfigError(
            f"{header.file}: is a {architecture!r} model; transformers reads these from GGUF files: "
            f"{', '.join(supported)}. Convert the model to safetensors, or pass model= and config= of your own."
        )
    data = derived_config(headers)
    data["dtype"] = str(_default_dtype(architecture, headers)).removeprefix("torch.")
    return ModelConfig(data=data, origin=f"{header.file} (metadata)")


def derived_config(headers: Sequence[Header]) -> dict[str, Any]:
    """What transformers makes of the metadata, nothing added."""
    header = headers[0]
    _check_blocks(headers)
    names = tuple(info.name for part in headers for info in part.tensors)
    try:
        if is_new_style(header.architecture):
            from transformers.integrations.gguf import get_gguf_config

            config: dict[str, Any] = get_gguf_config(dict(header.metadata), names)
        else:
            config = _legacy_config(header, names)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ConfigError(
            f"{header.file}: transformers can't make a config of its {header.architecture!r} metadata, which may be "
            f"incomplete ({type(error).__name__}: {error}). Pass config= to do without it."
        ) from error
    return config


def _legacy_config(header: Header, names: Iterable[str]) -> dict[str, Any]:
    """``load_gguf_checkpoint(file)["config"]``, from a file without vocabulary and values.

    That function makes numpy arrays of every token several times over (9 s for 49,152 tokens on one core), to look at
    a handful of numbers. Given a digest of the file it returns the same in milliseconds.
    """
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        file.write(digest(header, names))
        file.flush()
        config: dict[str, Any] = load_gguf_checkpoint(file.name, return_tensors=False)["config"]
    return config


def digest(header: Header, names: Iterable[str]) -> bytes:
    """A GGUF file with all that a config depends on: numbers, the model's own strings, and names of tensors.

    The tensors are empty. A string as long as the vocabulary stands in for it, as only its length is asked for.
    """
    entries = [raw for key, raw in header.entries.items() if not _is_tokenizer_data(header.metadata[key], key)]
    if (size := sum(map(len, entries))) > _LARGEST_DIGEST:
        raise ConfigError(f"{header.file}: has {size} bytes of metadata besides the tokenizer; that is no model config")
    if (tokens := _vocabulary(header)) is not None:
        entries.append(_text(_VOCABULARY) + struct.pack("<I", STRING) + _text("-" * tokens))
    rows = [_text(name) + struct.pack("<IQIQ", 1, 0, GGMLQuantizationType.F32, 0) for name in names]
    head = MAGIC + struct.pack("<IQQ", 3, len(rows), len(entries))
    alignment = header.metadata.get("general.alignment", ALIGNMENT)
    assert isinstance(alignment, int)
    return b"".join((head, *entries, *rows, bytes(alignment)))


def _vocabulary(header: Header) -> int | None:
    """How many tokens the file has; what is given as a length was counted, so it is no larger than the file."""
    tokens = header.metadata.get(_VOCABULARY)
    return tokens if isinstance(tokens, int) and _VOCABULARY not in header.entries else None


def _is_tokenizer_data(value: object, key: str) -> bool:
    return key.startswith("tokenizer.") and isinstance(value, (str, list))


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def _check_blocks(headers: Sequence[Header]) -> None:
    """No model has more layers than tensors; a config that claims so would make a skeleton of any size."""
    header, tensors = headers[0], sum(len(part.tensors) for part in headers)
    blocks = header.metadata.get(f"{header.architecture}.block_count")
    if isinstance(blocks, int) and blocks > tensors:
        raise ConfigError(f"{header.file}: claims {blocks} layers, but has {tensors} tensors")


def _default_dtype(architecture: str, headers: Sequence[Header]) -> torch.dtype:
    """The dtype that transformers loads the model in, unless it is told one.

    float32 for the architectures with tensor processors, whatever the file holds. The others take the file's own half
    type if no tensor is packed.
    """
    kinds = {info.kind for header in headers for info in header.tensors}
    halves = {GGMLQuantizationType.BF16: torch.bfloat16, GGMLQuantizationType.F16: torch.float16}
    if is_new_style(architecture) and kinds <= {GGMLQuantizationType.F32, *halves}:
        return next((dtype for kind, dtype in halves.items() if kind in kinds), torch.float32)
    return torch.float32
