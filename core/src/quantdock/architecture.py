"""What the loader must know about a model family, and what it assumes of a plain module."""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from quantdock.conversion import Conversion, rename
from quantdock.errors import UnsupportedError
from quantdock.tensors import Role, TensorSpec

if TYPE_CHECKING:
    from quantdock.quantizer import Quantizer
    from quantdock.source import Source


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Where stored tensors go."""

    conversions: Sequence[Conversion]
    unmatched: Mapping[str, str] = field(default_factory=dict)
    """Stored name without a parameter -> the parameter name it was looked up as."""


@dataclass(frozen=True, kw_only=True)
class LoadOutcome:
    """What an architecture is told when every tensor is in place."""

    loaded: Collection[str]
    """Parameters that got their values from the checkpoint."""
    missing: Collection[str]
    """Parameters that the user or the architecture allowed to be missing; to be initialised."""
    tied: Mapping[str, str]
    """Parameter -> the parameter it shares its tensor with."""
    devices: Mapping[str, torch.device | str]
    """Module path -> device, as accelerate writes device maps; ``{"": device}`` for one device."""
    quantizers: Sequence[Quantizer[Any]]
    """The quantizers of this load, in the order of their rules."""
    quantization_config: Mapping[str, Any] | None
    """What will be saved as the model's ``quantization_config``; ``None`` when nothing is quantized."""


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """A model as a row of blocks, each of which is fed with the hidden states that the one before it returns."""

    paths: Sequence[str]
    """Their module paths, in order of execution; empty for a model that isn't such a row."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the model's forward for a plain pass, such as ``use_cache=False``."""
    max_positions: int | None = None
    """Tokens that a sample may have."""
    hidden_size: int | None = None
    """Features of the hidden states, to know their bytes beforehand."""

    @classmethod
    def of(cls, model: torch.nn.Module) -> Blocks:
        """The module list that holds most of the model's elements, and lies in no other list."""
        lists = [
            (path, module)
            for path, module in model.named_modules()
            if isinstance(module, torch.nn.ModuleList) and len(module) > 0
        ]
        paths = [path for path, _ in lists]
        outer = [
            (sum(parameter.numel() for parameter in module.parameters()), path, len(module))
            for path, module in lists
            if not any(path.startswith(f"{other}.") for other in paths)
        ]
        if not outer:
            return cls(paths=())
        _, path, count = max(outer, key=lambda found: found[0])
        return cls(paths=[f"{path}.{index}" for index in range(count)])


class Chatter(Protocol):
    """A loaded model with its tokenizer: text in, text out. The command line talks to models through it."""

    def stream(
        self, messages: Sequence[Mapping[str, str]], *, max_new_tokens: int, temperature: float
    ) -> Generator[str, None, None]:
        """Answer a conversation, by the model's own chat template.

        Gives the text of each generated token as it comes; an empty one when its characters aren't complete yet, or
        aren't for people. Closing it ends the generation.

        Args:
            messages: ``{"role": "system" | "user" | "assistant", "content": text}``, oldest first.
            max_new_tokens: of the answer, at most.
            temperature: 0 takes the likeliest token each time.

        Raises:
            UnsupportedError: the model has no chat template, or it can't express these messages.
        """

    def complete(self, prompt: str, *, max_new_tokens: int) -> str:
        """What the model writes after ``prompt``, the likeliest token each time; the prompt isn't repeated."""


class Architecture:
    """A model family, as data and a few duties. The defaults fit any ``nn.Module``.

    Subclass it in the plugin that implements ``build_model``.
    """

    def route(self, stored: Mapping[str, TensorSpec], slots: Mapping[str, TensorSpec]) -> Routing:
        """Match stored tensors with the parameters of the skeleton; names are equal by default."""
        known = [rename(name, name, spec) for name, spec in stored.items() if name in slots]
        return Routing(conversions=known, unmatched={name: name for name in stored if name not in slots})

    def role(self, module: torch.nn.Module, leaf: str) -> Role:
        """What a parameter is to its module."""
        if leaf == "weight" and type(module) is torch.nn.Linear:
            return "linear"
        if leaf == "weight" and type(module) is torch.nn.Embedding:
            return "embedding"
        return "other"

    def dtype(self, name: str) -> torch.dtype | None:
        """The dtype a parameter must have whatever was asked for; ``None`` when it may follow."""
        return None

    def tied(self) -> Mapping[str, str]:
        """Parameters that share the tensor of another: name -> the name it is tied to."""
        return {}

    def kept(self) -> Mapping[str, str]:
        """Parameters that aren't quantized unless a pattern names them literally: name -> reason."""
        return {}

    def may_be_missing(self, name: str) -> str | None:
        """Why the architecture doesn't mind that ``name`` isn't in a checkpoint; ``None`` when it does."""
        return None

    def may_be_unexpected(self, stored: str, target: str) -> str | None:
        """Why the architecture doesn't mind a stored tensor it has no parameter for; ``None`` when it does."""
        return None

    def is_head(self, name: str) -> bool:
        """Whether a parameter belongs to a task head on top of the base model, which fine-tuning adds anew."""
        return False

    def no_split_modules(self) -> Sequence[str]:
        """Class names of modules that must stay on one device."""
        return ()

    def dispatch_options(self) -> Mapping[str, Any]:
        """Arguments for ``accelerate.dispatch_model`` when the model is on several devices."""
        return {}

    def blocks(self, model: torch.nn.Module) -> Blocks:
        """The model as a row of blocks, for quantizers that look at activations; asked before modules are swapped."""
        return Blocks.of(model)

    def tokenize(self, texts: Sequence[str], tokenizer: Any, source: Source) -> list[list[int]]:
        """Token ids of texts, for quantizers that look at activations.

        Args:
            texts: any number.
            tokenizer: what the user named: a tokenizer, or the path of one; ``None`` for the source's own.
            source: where the weights come from, and the files of a tokenizer may be.

        Raises:
            UnsupportedError: there is none, or it can't be used.
        """
        raise UnsupportedError(f"{type(self).__name__} has no tokenizer for texts; pass token ids instead")

    def finish(self, outcome: LoadOutcome) -> None:
        """Initialise what is missing by the family's own rule, recreate non-persistent buffers, tie.

        Every parameter that was loaded is in place; the rest, and all non-persistent buffers, are still on the meta
        device. The default can do that for a module that has neither.

        Raises:
            UnsupportedError: it can't; names what is left.
        """
        left = [*outcome.missing, *outcome.tied]
        if left:
            raise UnsupportedError(
                f"{type(self).__name__} has no rule to initialise or tie {', '.join(map(repr, left[:5]))}; leave "
                "nothing missing, or use an architecture plugin"
            )

    def export(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The state dict as the ecosystem stores it: tied copies dropped, conversions undone."""
        return state

    def forget_quantization(self) -> None:
        """The model was dequantized; remove what marks it as quantized."""

    def chatter(self, source: Source) -> Chatter | None:
        """The loaded model as something to talk to; ``None`` when it doesn't generate text or has no tokenizer.

        Args:
            source: where the weights came from, and the files of a tokenizer may be.

        Raises:
            UnsupportedError: there is a tokenizer, but it can't be used.
        """
        return None

    def write_config(self, folder: Path, quantization: Mapping[str, Any] | None) -> None:
        """Write the config files of a saved model into ``folder``, ``quantization_config`` included if there is one."""
        raise UnsupportedError(f"{type(self).__name__} doesn't know how to write the model's config")


@dataclass(frozen=True, kw_only=True)
class Skeleton:
    """The model on the meta device, and its architecture."""

    model: torch.nn.Module
    architecture: Architecture
    built_by: str
    """The plugin that built it, for the report."""
