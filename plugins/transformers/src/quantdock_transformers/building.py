"""Instantiate a transformers model on the meta device."""

from __future__ import annotations

import json
from typing import Any

from quantdock import Checkpoint, ConfigError, LoadOptions, ModelConfig, Skeleton, Source
from quantdock_transformers.architecture import TransformersArchitecture
from quantdock_transformers.configs import model_class, native_config

GENERATION_CONFIG = "generation_config.json"


def build(source: Source, config: ModelConfig, checkpoint: Checkpoint, options: LoadOptions) -> Skeleton:
    """The skeleton of the model that ``config`` describes.

    Raises:
        ConfigError: the config and transformers' classes don't agree; names the file and what is wrong.
    """
    from transformers.initialization import no_init_weights
    from transformers.modeling_utils import patch_output_recorders
    from transformers.utils.generic import ContextManagers

    whole = native_config(source, config, options)
    found_class, native = model_class(whole, source, config, options)
    dtype = options.settled_dtype
    native.dtype = dtype
    for key in native.sub_configs:
        if (part := getattr(native, key)) is not None:
            part.dtype = dtype
    native.name_or_path = source.name
    if options.attn_implementation is not None:
        native._attn_implementation = options.attn_implementation
    try:
        # Nothing is initialised on the meta device, so nothing has to run as if.
        contexts = [*found_class.get_init_context(dtype, False, False, None), no_init_weights()]
        with ContextManagers(contexts):
            model = found_class(native)
            patch_output_recorders(model)
    except (TypeError, ValueError, KeyError, AttributeError, IndexError, RuntimeError, ImportError) as error:
        raise ConfigError(
            f"{config.origin}: {found_class.__name__} can't be built from it: {type(error).__name__}: {error}"
        ) from error
    # Other formats hold their model in one file; what lies beside it belongs to others.
    generation = _generation_config(model, source) if checkpoint.format in ("safetensors", "pickle") else None
    architecture = TransformersArchitecture(model, dtype, generation_config=generation, is_part=native is not whole)
    return Skeleton(model=model, architecture=architecture, built_by="quantdock-transformers")


def _generation_config(model: Any, source: Source) -> Any:
    """What the source says about generating, else what the model's config says, as transformers decides it."""
    from transformers import GenerationConfig

    if not model.can_generate():
        return None
    path = source.find(GENERATION_CONFIG)
    if path is not None:
        try:
            return GenerationConfig.from_dict(json.loads(path.read_bytes()))
        except ValueError as error:
            raise ConfigError(f"{path}: not a generation config: {error}") from error
    config_path = source.find("config.json")
    if config_path is None:
        return None
    return GenerationConfig.from_pretrained(
        str(config_path.parent), config_file_name="config.json", _from_model_config=True, local_files_only=True
    )
