"""The options that commands share, and what they mean as arguments of ``quantdock.load``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

_SOURCE = "Source"
_MODEL = "Model and quantization"
_PLACE = "Devices and memory"
_LEDGER = "Exceptions to what must fit"


@dataclass(frozen=True, kw_only=True)
class SourceArguments:
    """Which files of a source are meant."""

    revision: Annotated[
        str | None,
        typer.Option(metavar="REV", help="Branch, tag or commit of a repository.", rich_help_panel=_SOURCE),
    ] = None
    cache_dir: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Cache of the Hub's files.", rich_help_panel=_SOURCE),
    ] = None
    local_files_only: Annotated[
        bool, typer.Option("--local-files-only", help="Use only what is in the cache.", rich_help_panel=_SOURCE)
    ] = False
    variant: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Variant of the weight files, such as fp16.", rich_help_panel=_SOURCE),
    ] = None
    no_safetensors: Annotated[
        bool,
        typer.Option(
            "--no-safetensors",
            help="Read pickles instead (pytorch_model.bin), restricted to tensors.",
            rich_help_panel=_SOURCE,
        ),
    ] = False
    policy: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Policy file, beside the one that QUANTDOCK_POLICY names.", rich_help_panel=_SOURCE
        ),
    ] = None

    def options(self) -> dict[str, Any]:
        """Arguments for ``inspect`` and ``load``."""
        return {
            "revision": self.revision,
            "cache_dir": self.cache_dir,
            "local_files_only": self.local_files_only,
            "variant": self.variant,
            "use_safetensors": not self.no_safetensors,
            "policy": self.policy,
        }


@dataclass(frozen=True, kw_only=True)
class LoadArguments(SourceArguments):
    """How to load it. A private repository's token is taken from ``HF_TOKEN`` or from ``hf auth login``."""

    quantize: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PRESET",
            help="Quantize everything; as PATTERN=PRESET, the parameters that the pattern matches. Repeatable: the "
            "first pattern that matches decides, a preset without one takes the rest. 'none' leaves parameters as "
            "they are. Instead of a preset's name: a JSON object as in config.json.",
            rich_help_panel=_MODEL,
        ),
    ] = None
    skip: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN", help="Keep these parameters in full precision. Repeatable.", rich_help_panel=_MODEL
        ),
    ] = None
    dtype: Annotated[
        str, typer.Option(help="Of what stays in full precision, such as bfloat16.", rich_help_panel=_MODEL)
    ] = "auto"
    task: Annotated[str, typer.Option(help="Head of the model: causal-lm, base, ...", rich_help_panel=_MODEL)] = (
        "causal-lm"
    )
    attn_implementation: Annotated[
        str | None, typer.Option(metavar="NAME", help="Such as sdpa or eager.", rich_help_panel=_MODEL)
    ] = None
    config_override: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=JSON",
            help="Change the config; dots in KEY lead into nested objects. Repeatable.",
            rich_help_panel=_MODEL,
        ),
    ] = None
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Run the model code that the source ships.", rich_help_panel=_MODEL),
    ] = False
    device_map: Annotated[
        str | None,
        typer.Option(
            metavar="DEVICE",
            help="A device, auto, balanced, sequential, or a JSON object of module paths and devices.",
            rich_help_panel=_PLACE,
        ),
    ] = None
    max_memory: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DEVICE=SIZE",
            help="What a device may be given, such as 0=20GiB. Repeatable.",
            rich_help_panel=_PLACE,
        ),
    ] = None
    offload_dir: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="For what the device map puts on disk.", rich_help_panel=_PLACE),
    ] = None
    memory_budget: Annotated[
        str, typer.Option(metavar="SIZE", help="Bytes in flight beside the model.", rich_help_panel=_PLACE)
    ] = "256MiB"
    workers: Annotated[
        int | None, typer.Option(min=1, help="Threads that convert and quantize.", rich_help_panel=_PLACE)
    ] = None
    allow_missing: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Parameters that may be initialised anew. Repeatable.",
            rich_help_panel=_LEDGER,
        ),
    ] = None
    ignore_unexpected: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN", help="Stored tensors that may be left out. Repeatable.", rich_help_panel=_LEDGER
        ),
    ] = None
    ignore_mismatched_sizes: Annotated[
        bool,
        typer.Option(
            "--ignore-mismatched-sizes",
            help="Initialise parameters whose stored shape differs.",
            rich_help_panel=_LEDGER,
        ),
    ] = False
    cache: Annotated[
        bool | None,
        typer.Option(
            "--cache/--no-cache",
            help="Keep what is quantized, and take it from there the next time; if not given, QUANTDOCK_CACHE decides.",
        ),
    ] = None
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no remarks on stderr.")] = False

    def options(self) -> dict[str, Any]:
        """Arguments for ``quantdock.load`` and ``quantdock.plan``."""
        return super().options() | {
            "quantize": quantize_of(self.quantize or ()),
            "skip": self.skip or (),
            "dtype": self.dtype,
            "task": self.task,
            "attn_implementation": self.attn_implementation,
            "config_overrides": overrides_of(self.config_override or ()),
            "trust_remote_code": self.trust_remote_code,
            "device_map": device_map_of(self.device_map),
            "max_memory": max_memory_of(self.max_memory or ()),
            "offload_dir": self.offload_dir,
            "memory_budget": self.memory_budget,
            "workers": self.workers,
            "allow_missing": self.allow_missing or (),
            "ignore_unexpected": self.ignore_unexpected or (),
            "ignore_mismatched_sizes": self.ignore_mismatched_sizes,
            "progress": False if self.quiet else None,
            "cache": self.cache,
        }


def quantize_of(values: Sequence[str]) -> Any:
    """``quantize=`` for ``load``: ``None``, a preset, a config, or patterns with any of these."""
    patterns: dict[str, Any] = {}
    rest: list[Any] = []
    for value in values:
        if "=" not in value or value.startswith("{"):
            rest.append(_preset(value))
            continue
        pattern, preset = _pair("--quantize", value, "PATTERN=PRESET")
        if pattern in patterns:
            raise typer.BadParameter(f"the pattern {pattern!r} is given twice", param_hint="--quantize")
        patterns[pattern] = _preset(preset)
    if len(rest) > 1:
        raise typer.BadParameter(
            "more than one preset has no pattern; write PATTERN=PRESET for all but one", param_hint="--quantize"
        )
    if not patterns:
        return rest[0] if rest else None
    return patterns | ({"*": rest[0]} if rest else {})


def _preset(text: str) -> Any:
    if text.startswith("{"):
        return _json("--quantize", text)
    return None if text.lower() == "none" else text


def device_map_of(value: str | None) -> Any:
    """``device_map=`` for ``load``: a word, the number of a device, or an object."""
    if value is None:
        return None
    return _json("--device-map", value) if value.startswith("{") else _device(value)


def max_memory_of(values: Sequence[str]) -> dict[int | str, str] | None:
    """``max_memory=`` for ``load``."""
    pairs = [_pair("--max-memory", value, "DEVICE=SIZE") for value in values]
    return {_device(device): size for device, size in pairs} or None


def overrides_of(values: Sequence[str]) -> dict[str, Any] | None:
    """``config_overrides=`` for ``load``: dotted keys become nested objects."""
    result: dict[str, Any] = {}
    for value in values:
        key, text = _pair("--config-override", value, "KEY=JSON")
        parsed = _json("--config-override", text)
        *path, last = key.split(".")
        holder = result
        for part in path:
            holder = holder.setdefault(part, {})
            if not isinstance(holder, dict):
                raise typer.BadParameter(
                    f"{key!r} leads into a value that is no object", param_hint="--config-override"
                )
        if last in holder:
            raise typer.BadParameter(f"{key!r} is given twice", param_hint="--config-override")
        holder[last] = parsed
    return result or None


def _device(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _pair(option: str, value: str, form: str) -> tuple[str, str]:
    key, separator, rest = value.partition("=")
    if not separator or not key.strip() or not rest.strip():
        raise typer.BadParameter(f"{value!r}: expected {form}", param_hint=option)
    return key.strip(), rest.strip()


def _json(option: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(
            f"{text!r} isn't JSON ({error}); a string needs quotes: '\"text\"'", param_hint=option
        ) from error
