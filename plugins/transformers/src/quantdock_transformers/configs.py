"""From ``config.json`` to transformers' config objects and model classes."""

from __future__ import annotations

import copy
import difflib
import functools
import re
from collections.abc import Mapping
from typing import Any

from quantdock import ConfigError, LoadOptions, ModelConfig, Source

BASE_TASK = "base"


def native_config(source: Source, config: ModelConfig, options: LoadOptions) -> Any:
    """The config object of the model.

    Raises:
        ConfigError: there is no ``model_type``, this transformers doesn't know it, its own code is needed and not
            trusted, or an argument is no attribute of the config.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import PreTrainedConfig

    if isinstance(config.native, PreTrainedConfig):
        return copy.deepcopy(config.native)
    config_class = _config_class(source, config, options)
    arguments = dict(options.extras.get("config_arguments", {}))
    # Infinity and NaN have a spelling of their own in config files.
    data = config_class._decode_special_floats(copy.deepcopy(dict(config.data)))
    data.pop("quantization_config", None)
    try:
        native, unused = config_class.from_dict(data, return_unused_kwargs=True, **arguments)
    except (TypeError, ValueError, KeyError, AttributeError, StrictDataclassError) as error:
        raise ConfigError(
            f"{config.origin}: {config_class.__name__} refuses it: {type(error).__name__}: {error}"
        ) from error
    if unused:
        raise ConfigError(
            f"{', '.join(map(repr, unused))}: neither an argument of from_pretrained that quantdock supports nor an "
            f"attribute of {config_class.__name__}"
        )
    return native


def _config_class(source: Source, config: ModelConfig, options: LoadOptions) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    remote = _remote_reference(config, "AutoConfig")
    model_type = config.data.get("model_type")
    known = isinstance(model_type, str) and model_type in CONFIG_MAPPING
    if remote is not None and options.trust_remote_code:
        return _remote_class(remote, source, options)
    if known:
        if model_type == "mistral" and "layer_types" in config.data:
            model_type = "ministral"  # as transformers' AutoConfig reads such files
        return CONFIG_MAPPING[model_type]
    if remote is not None:
        raise ConfigError(
            f"{config.origin}: model_type {model_type!r} comes with code of its own ({remote}), which runs only with "
            "trust_remote_code=True; read it first"
        )
    if model_type is None:
        raise ConfigError(
            f"{config.origin}: no model_type, so the architecture isn't known; add it, or pass config_overrides="
            "{'model_type': ...}"
        )
    near = difflib.get_close_matches(str(model_type), list(CONFIG_MAPPING.keys()), n=3)
    import transformers

    raise ConfigError(
        f"{config.origin}: model_type {model_type!r} is not known to transformers {transformers.__version__}"
        + (f"; close: {', '.join(near)}" if near else "")
    )


def model_class(native: Any, source: Source, config: ModelConfig, options: LoadOptions) -> tuple[type[Any], Any]:
    """The class for ``options.task``, and the config it takes (a composite config's text part for text models).

    Raises:
        ConfigError: transformers has no such task, or no class for it.
    """
    from transformers.models.auto.auto_factory import _get_model_class, add_generation_mixin_to_remote_model

    auto = _auto_class(options.task)
    remote = _remote_reference(config, auto.__name__)
    if remote is not None and options.trust_remote_code:
        return add_generation_mixin_to_remote_model(_remote_class(remote, source, options)), native
    mapping = auto._model_mapping
    if type(native) not in mapping:
        raise ConfigError(
            f"{config.origin}: transformers has no {options.task!r} class for {type(native).__name__}; "
            f"its tasks: {', '.join(_tasks_of(native)) or 'none'}"
        )
    found = _get_model_class(native, mapping)
    text_class = native.sub_configs.get("text_config")
    if text_class is not None and getattr(found, "config_class", None) == text_class:
        return found, native.get_text_config()
    return found, native


def _remote_reference(config: ModelConfig, auto_name: str) -> str | None:
    auto_map = config.data.get("auto_map")
    reference = auto_map.get(auto_name) if isinstance(auto_map, Mapping) else None
    return reference if isinstance(reference, str) else None


def _remote_class(reference: str, source: Source, options: LoadOptions) -> Any:
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    origin = source.name if source.identity["kind"] == "hub" else str(source.root)
    return get_class_from_dynamic_module(
        reference,
        origin,
        revision=source.identity.get("revision", options.revision),
        cache_dir=options.cache_dir,
        token=options.token,
        local_files_only=options.local_files_only,
    )


@functools.cache
def tasks() -> Mapping[str, Any]:
    """Every task: name -> transformers' auto class (``AutoModelForCausalLM`` is ``causal-lm``)."""
    from transformers.models.auto import modeling_auto

    result: dict[str, Any] = {BASE_TASK: modeling_auto.AutoModel}
    for name, value in vars(modeling_auto).items():
        match = re.fullmatch(r"AutoModelFor(\w+)", name)
        if match is not None and isinstance(value, type) and hasattr(value, "_model_mapping"):
            result[re.sub(r"(?<=[a-z])(?=[A-Z])", "-", match[1]).lower()] = value
    return result


def _auto_class(task: str) -> Any:
    known = tasks()
    if task not in known:
        near = difflib.get_close_matches(task, known, n=3)
        hint = f"; close: {', '.join(near)}" if near else f"; there are: {', '.join(sorted(known))}"
        raise ConfigError(f"task={task!r} is not known{hint}")
    return known[task]


def _tasks_of(native: Any) -> list[str]:
    return sorted(task for task, auto in tasks().items() if type(native) in auto._model_mapping)
