"""What is in a checkpoint, from headers only: the config, the files, every stored tensor. No model is built."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pluggy

from quantdock.checkpoint import Checkpoint
from quantdock.config import CONFIG_NAME, ModelConfig, read_config
from quantdock.discovery import Catalog, installed
from quantdock.options import LoadOptions
from quantdock.policy import Policy
from quantdock.source import Source, open_source
from quantdock.stages import stage_manager
from quantdock.tensors import StoredTensor


@dataclass(frozen=True, kw_only=True)
class TensorGroup:
    """Stored tensors that differ only in numbers within their names, or that share a dtype."""

    name: str
    """Names with numbers as ``*``, or the dtype."""
    count: int
    dtype: str
    shape: tuple[int, ...]
    """Of each tensor; empty in totals."""
    values: int
    nbytes: int
    """Bytes in the files."""
    files: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What ``inspect`` found."""

    source: Mapping[str, str]
    """What pins the source's content."""
    config: Mapping[str, Any]
    """The config; empty if the source has none."""
    dtype: str | None
    """What the config says that the model was saved in."""
    quantization: Mapping[str, Any] | None
    """The config's ``quantization_config``."""
    format: str
    files: Mapping[Path, int]
    """Weight file -> its bytes."""
    tensors: tuple[StoredTensor, ...]
    metadata: Mapping[str, str]

    @property
    def model_type(self) -> str | None:
        """What the config calls the model family."""
        found = self.config.get("model_type")
        return found if isinstance(found, str) else None

    @property
    def nbytes(self) -> int:
        """Bytes of all values in the files."""
        return sum(tensor.stored_nbytes for tensor in self.tensors)

    @property
    def groups(self) -> list[TensorGroup]:
        """Tensors whose names differ only in numbers, of one dtype and shape."""
        members: dict[tuple[str, str, tuple[int, ...]], list[StoredTensor]] = {}
        for tensor in self.tensors:
            members.setdefault((starred(tensor.name), dtype_label(tensor), tensor.spec.shape), []).append(tensor)
        return [_group(name, dtype, shape, found) for (name, dtype, shape), found in members.items()]

    @property
    def totals(self) -> list[TensorGroup]:
        """All tensors by dtype, the most bytes first."""
        members: dict[str, list[StoredTensor]] = {}
        for tensor in self.tensors:
            members.setdefault(dtype_label(tensor), []).append(tensor)
        totals = [_group(dtype, dtype, (), found) for dtype, found in members.items()]
        return sorted(totals, key=lambda total: -total.nbytes)

    def to_dict(self, *, every_tensor: bool = True) -> dict[str, Any]:
        """JSON-ready data, with every tensor or with groups of them."""
        detail: dict[str, Any] = {"groups": [asdict(group) for group in self.groups]}
        if every_tensor:
            detail = {"tensors": [_plain(tensor) for tensor in self.tensors]}
        return {
            "source": dict(self.source),
            "model_type": self.model_type,
            "architectures": self.config.get("architectures"),
            "dtype": self.dtype,
            "quantization": None if self.quantization is None else dict(self.quantization),
            "format": self.format,
            "files": [{"file": str(path), "nbytes": size} for path, size in self.files.items()],
            "metadata": dict(self.metadata),
            "count": len(self.tensors),
            "nbytes": self.nbytes,
            "totals": [
                {"dtype": total.dtype, "count": total.count, "values": total.values, "nbytes": total.nbytes}
                for total in self.totals
            ],
        } | detail


def inspect(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    variant: str | None = None,
    use_safetensors: bool = True,
    policy: str | os.PathLike[str] | None = None,
    plugins: Sequence[object] = (),
) -> Inspection:
    """Look into a source without building its model; takes a part of the arguments of ``load``, which explains them.

    Raises:
        SourceError: the source can't be found or reached.
        ConfigError: its config is broken; that there is none is no error here.
        CheckpointError: its weight files are damaged, incomplete or hostile.
    """
    options = LoadOptions(
        revision=revision,
        cache_dir=cache_dir,
        token=token,
        local_files_only=local_files_only,
        variant=variant,
        use_safetensors=use_safetensors,
        policy=policy,
        plugins=plugins,
    )
    hooks = stage_manager(Catalog(installed(), Policy.in_force(policy)), plugins)
    opened = open_source(source, options)
    config = _config(opened, options, hooks)
    checkpoint: Checkpoint = hooks.hook.find_checkpoints(source=opened, config=config, options=options)
    try:
        return Inspection(
            source=dict(opened.identity),
            config=config.data,
            dtype=config.dtype,
            quantization=config.quantization,
            format=checkpoint.format,
            files={path: path.stat().st_size for path in checkpoint.files},
            tensors=tuple(checkpoint.tensors.values()),
            metadata=checkpoint.metadata,
        )
    finally:
        checkpoint.close()


def _config(source: Source, options: LoadOptions, hooks: pluggy.PluginManager) -> ModelConfig:
    """What a plugin makes of the source, else its ``config.json``, else nothing: unlike a load, this can do without."""
    plugins_only = hooks.subset_hook_caller("resolve_config", [hooks.get_plugin("quantdock")])
    found: ModelConfig | None = plugins_only(source=source, options=options)
    if found is not None:
        return found
    path = source.find(CONFIG_NAME)
    return (
        ModelConfig(data={}, origin=f"{source.name} (which has no {CONFIG_NAME})")
        if path is None
        else read_config(path)
    )


def starred(name: str) -> str:
    """A dotted name with its numbers as ``*``."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def dtype_label(tensor: StoredTensor) -> str:
    """The dtype; where the file packs the values tighter, also how many bits one takes there."""
    dtype = str(tensor.spec.dtype).removeprefix("torch.")
    if tensor.stored_nbytes == tensor.spec.nbytes:
        return dtype
    return f"{dtype}, stored in {8 * tensor.stored_nbytes / max(1, tensor.spec.numel):.3g} bits"


def _group(name: str, dtype: str, shape: tuple[int, ...], members: Sequence[StoredTensor]) -> TensorGroup:
    return TensorGroup(
        name=name,
        count=len(members),
        dtype=dtype,
        shape=shape,
        values=sum(tensor.spec.numel for tensor in members),
        nbytes=sum(tensor.stored_nbytes for tensor in members),
        files=tuple(dict.fromkeys(tensor.file.name for tensor in members)),
    )


def _plain(tensor: StoredTensor) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "dtype": dtype_label(tensor),
        "shape": list(tensor.spec.shape),
        "nbytes": tensor.stored_nbytes,
        "file": tensor.file.name,
    }
