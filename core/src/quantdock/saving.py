"""Saving: safetensors shards, index and config, in the ecosystem's format, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from quantdock.errors import SaveError, UnsupportedError
from quantdock.options import as_path, parse_bytes
from quantdock.reporting import Record, attach, record_of
from quantdock.tensors import qualified

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def save(model: torch.nn.Module, folder: str | os.PathLike[str], *, max_shard_size: int | str = "5GB") -> Path:
    """Write a model that quantdock loaded; transformers and quantdock read the result, bit for bit.

    The files are written beside ``folder`` and renamed into place, so ``folder`` never holds half a model. Files of an
    existing folder that aren't the model's (a tokenizer, a README) are kept.

    Args:
        model: the model; where it has moved to since doesn't matter.
        folder: made if it doesn't exist.
        max_shard_size: bytes of one weight file, such as ``"5GB"``; a larger tensor gets a file of its own.

    Returns:
        The folder.

    Raises:
        SaveError: a method can't be saved, or the folder can't be written; nothing has changed then.
    """
    record = record_of(model)
    for chosen in record.selection:
        if chosen.quantizer.parameters and not chosen.quantizer.capabilities.save:
            raise SaveError(f"{chosen.label} ({chosen.offer.origin}) can't be saved; dequantize(model) first")
    target = as_path(folder)
    if target.exists() and not target.is_dir():
        raise SaveError(f"{target} is a file; name a folder")
    state = _exported(_state(model, record), model, record)
    metadata: dict[str, str] = {}
    for chosen in record.selection:
        metadata |= chosen.quantizer.saved_metadata(model) if chosen.quantizer.parameters else {}
    with aside(target) as staging:
        write_weights(state, staging, parse_bytes(max_shard_size, option="max_shard_size"), metadata)
        record.architecture.write_config(staging, record.quantization_config)
        if target.is_dir():
            _keep_others(target, staging)
    return target


def _state(model: torch.nn.Module, record: Record) -> dict[str, torch.Tensor]:
    """The state dict with each quantized parameter as its quantizer stores it."""
    from accelerate.utils import extract_model_from_parallel

    state = dict(extract_model_from_parallel(model).state_dict())
    for chosen in record.selection:
        quantizer = chosen.quantizer
        for parameter in quantizer.parameters.values():
            stored = quantizer.components(model, parameter)
            state.pop(parameter.name, None)  # what the module keeps there isn't stored, unless it is a component
            state.update({qualified(parameter.module, name): tensor for name, tensor in stored.items()})
    offloaded = [name for name, tensor in state.items() if tensor.is_meta]
    if offloaded:
        state.update(_fetched(model, offloaded))
    return state


def _exported(state: dict[str, torch.Tensor], model: torch.nn.Module, record: Record) -> dict[str, torch.Tensor]:
    """The state dict as the ecosystem stores it, with what it stores in pieces cut up."""
    pieces: dict[str, torch.Tensor] = {}
    for chosen in record.selection:
        quantizer = chosen.quantizer
        for parameter in filter(quantizer.stored_in_pieces, quantizer.parameters.values()):
            exported = {}
            for component in quantizer.components(model, parameter):
                tensor = state.pop(qualified(parameter.module, component))
                exported[component] = record.architecture.export({parameter.name: tensor})
            pieces.update(quantizer.disassemble(parameter, exported))
    return record.architecture.export(state) | pieces


def _fetched(model: torch.nn.Module, names: list[str]) -> dict[str, torch.Tensor]:
    """Values of parameters that accelerate has offloaded."""
    result = {}
    for name in names:
        path, _, leaf = name.rpartition(".")
        hook = getattr(model.get_submodule(path), "_hf_hook", None)
        weights = getattr(hook, "weights_map", None)
        if weights is None:
            raise SaveError(f"{name!r} has no values (it is on the meta device) and isn't offloaded; nothing was saved")
        result[name] = weights[leaf]
    return result


def write_weights(
    state: Mapping[str, torch.Tensor], folder: Path, limit: int, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors to ``model.safetensors``, or to shards of at most ``limit`` bytes and their index; ``metadata``
    goes into the header of each."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    split = split_torch_state_dict_into_shards(
        dict(state), filename_pattern="model{suffix}.safetensors", max_shard_size=limit
    )
    for file, names in split.filename_to_tensors.items():
        shard = {name: state[name].detach().contiguous() for name in names}
        save_file(shard, folder / file, metadata={"format": "pt", **(metadata or {})})
    if split.is_sharded:
        index = {"metadata": dict(split.metadata), "weight_map": dict(split.tensor_to_filename)}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _is_weights(name: str) -> bool:
    return (name.startswith("model") and name.endswith((".safetensors", ".safetensors.index.json"))) or name.startswith(
        "pytorch_model"
    )


def _keep_others(folder: Path, staging: Path) -> None:
    """What isn't the model's stays: hard links where possible, copies elsewhere."""
    for entry in folder.iterdir():
        if (staging / entry.name).exists() or (entry.is_file() and _is_weights(entry.name)):
            continue
        if entry.is_dir():
            shutil.copytree(entry, staging / entry.name, symlinks=True)
        else:
            shutil.copy2(entry, staging / entry.name, follow_symlinks=False)


@contextmanager
def aside(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` that takes its place when the block ends well, and vanishes when it doesn't."""
    from safetensors import SafetensorError  # its writer raises this one for a full disk, too

    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        yield staging
        os.chmod(staging, target.stat().st_mode & 0o777 if target.is_dir() else 0o777 & ~_umask())
        if target.is_dir():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
            target.rename(old / "folder")
            try:
                staging.rename(target)
            except OSError:
                (old / "folder").rename(target)
                raise
            finally:
                if target.is_dir():
                    shutil.rmtree(old, ignore_errors=True)
        else:
            staging.rename(target)
    except (OSError, SafetensorError) as error:
        raise SaveError(f"{target}: can't be written ({error}); nothing was saved") from error
    finally:
        if staging.exists():
            shutil.rmtree(staging, ignore_errors=True)


def _umask() -> int:
    current = os.umask(0o022)
    os.umask(current)
    return current


def dequantize(model: torch.nn.Module, *, dtype: torch.dtype | None = None) -> torch.nn.Module:
    """Turn the quantized parameters of a model back into full precision, in place, and return it.

    Args:
        model: a model that quantdock loaded.
        dtype: of the parameters; what they would have been loaded in if not given.

    Raises:
        UnsupportedError: a method of the model can't dequantize; nothing has changed then.
    """
    record = record_of(model)
    for chosen in record.selection:
        if chosen.quantizer.parameters and not chosen.quantizer.capabilities.dequantize:
            raise UnsupportedError(f"{chosen.label} ({chosen.offer.origin}) can't dequantize; nothing was changed")
    with torch.no_grad():
        for chosen in record.selection:
            quantizer = chosen.quantizer
            for parameter in quantizer.parameters.values():
                _dequantize_one(model, quantizer, parameter, dtype)
    record.architecture.forget_quantization()
    attach(
        model,
        Record(
            report=record.report,
            architecture=record.architecture,
            selection=type(record.selection)(),
            quantization_config=None,
        ),
    )
    return model


def _dequantize_one(model: torch.nn.Module, quantizer: Any, parameter: Any, dtype: torch.dtype | None) -> None:
    module = parameter.owner(model)
    components = quantizer.components(model, parameter)
    tensor = quantizer.dequantize(components, parameter)
    restored = quantizer.restore_module(module, parameter)
    device = tensor.device
    value = tensor.to(dtype or parameter.spec.dtype)
    restored.register_parameter(parameter.leaf, torch.nn.Parameter(value))
    for name, other in module.named_parameters(recurse=False):
        if restored is not module and name in restored._parameters and name != parameter.leaf:
            moved = other.detach().to(device=device, dtype=dtype or other.dtype)
            restored.register_parameter(name, torch.nn.Parameter(moved))
    restored.train(module.training)
    if restored is not module:
        model.set_submodule(parameter.module, restored)
