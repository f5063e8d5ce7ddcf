"""From what a user or a checkpoint asks for to quantizers: exact name -> entry point -> class, lazily.

This module imports no torch: listing what is installed reads metadata only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from quantdock.discovery import CONFIGS, PRESETS, QUANTIZERS, Catalog, Offer, installed
from quantdock.errors import ConfigError, PluginError, QuantdockError, UnknownMethodError, UnknownPresetError
from quantdock.policy import Policy

if TYPE_CHECKING:
    from quantdock.quantizer import QuantizationConfig, Quantizer

MIXED = "quantdock"
"""``quant_method`` of a model that several methods share; its parts name their patterns and configs."""


def quantizers(policy: str | os.PathLike[str] | None = None) -> Mapping[str, str]:
    """Installed quantization methods: ``quant_method`` -> the distribution (and version) that serves it.

    Reads package metadata only. What a policy refuses isn't listed.
    """
    return _listing(QUANTIZERS, policy)


def presets(policy: str | os.PathLike[str] | None = None) -> Mapping[str, str]:
    """Installed presets, as ``quantize=`` takes them: name -> the distribution (and version) that offers it.

    Reads package metadata only. What a policy refuses isn't listed.
    """
    return _listing(PRESETS, policy)


def _listing(group: str, policy: str | os.PathLike[str] | None) -> Mapping[str, str]:
    catalog = Catalog(installed(), Policy.in_force(policy))
    return MappingProxyType({offer.name: offer.origin for offer in catalog.offers(group)})


@dataclass(frozen=True, kw_only=True, eq=False)
class Chosen:
    """A quantizer that serves this load."""

    quantizer: Quantizer[Any]
    label: str
    """What the user or the checkpoint called it: a preset or a method."""
    offer: Offer


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Parameters that match ``pattern`` go to ``chosen``, or stay as they are."""

    pattern: str
    chosen: Chosen | None


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The quantizers of a load, and which parameters each is offered: the first rule that matches decides."""

    rules: tuple[Rule, ...] = ()
    prequantized: bool = False
    by_user: bool = False
    """Whether the rules' patterns are the user's, so that one that matches nothing is an error."""

    def __iter__(self) -> Iterator[Chosen]:
        return iter({id(rule.chosen): rule.chosen for rule in self.rules if rule.chosen is not None}.values())


def select(asked: Any, stored: Mapping[str, Any] | None, catalog: Catalog) -> Selection:
    """The quantizers for ``quantize=asked`` and a checkpoint whose own ``quantization_config`` is ``stored``.

    Raises:
        UnknownMethodError, UnknownPresetError: nothing that is installed serves it; says what to install.
        ConfigError: the config doesn't fit, or contradicts the checkpoint's.
    """
    if stored is not None:
        return _stored_selection(asked, stored, catalog)
    if asked is None:
        return Selection()
    if isinstance(asked, Mapping) and "quant_method" not in asked:
        if not asked:
            raise ConfigError("quantize={} names no pattern; pass None, a preset or patterns")
        rules = tuple(Rule(pattern=str(key), chosen=_choose(value, catalog)) for key, value in asked.items())
        return Selection(rules=rules, by_user=True)
    return Selection(rules=(Rule(pattern="*", chosen=_choose(asked, catalog)),))


def _stored_selection(asked: Any, stored: Mapping[str, Any], catalog: Catalog) -> Selection:
    if stored.get("quant_method") == MIXED:
        if asked is not None:
            raise ConfigError("the checkpoint is already quantized, by several methods; drop quantize=")
        parts = stored.get("parts")
        if not isinstance(parts, list) or not all(isinstance(part, Mapping) for part in parts):
            raise ConfigError(f"quantization_config.parts is {parts!r}, expected a list of objects")
        rules = [
            Rule(pattern=str(pattern), chosen=chosen)
            for part in parts
            for chosen in [_from_config(_config_of(part.get("config"), catalog), catalog, prequantized=True)]
            for pattern in part.get("patterns", ())
        ]
        return Selection(rules=tuple(rules), prequantized=True)
    config = _config_of(stored, catalog)
    if asked is not None:
        if isinstance(asked, Mapping) and "quant_method" not in asked:
            raise ConfigError(
                f"the checkpoint is already quantized ({config.quant_method}); patterns can't change that. "
                "Drop quantize=, or load the unquantized checkpoint."
            )
        override = _config_of(asked, catalog)
        if type(override) is not type(config):
            raise ConfigError(
                f"the checkpoint is already quantized with {config.quant_method!r}, but quantize= asks for "
                f"{override.quant_method!r}. Drop quantize=, or load the unquantized checkpoint."
            )
        config = config.overridden_by(override, _spelled_out(asked, override))
    return Selection(
        rules=(Rule(pattern="*", chosen=_from_config(config, catalog, prequantized=True)),), prequantized=True
    )


def _spelled_out(asked: Any, config: QuantizationConfig) -> frozenset[str] | None:
    """The fields that a user named in an override; foreign config objects don't tell, so what isn't a default is."""
    if isinstance(asked, Mapping):
        return frozenset(asked) & frozenset(vars(config))
    return None if asked is config or isinstance(asked, str) else config.beside_defaults()


def _choose(value: Any, catalog: Catalog) -> Chosen | None:
    if value is None:
        return None
    label = value if isinstance(value, str) else None
    return _from_config(_config_of(value, catalog), catalog, label=label)


def _from_config(
    config: QuantizationConfig, catalog: Catalog, *, label: str | None = None, prequantized: bool = False
) -> Chosen:
    offer, quantizer_class = _quantizer_class(config.quant_method, catalog)
    capability = "load" if prequantized else "quantize"
    if not getattr(quantizer_class.capabilities, capability):
        task = "load checkpoints that are already quantized" if prequantized else "quantize while loading"
        raise ConfigError(f"{config.quant_method!r} ({offer.origin}) can't {task}")
    quantizer = quantizer_class(config, prequantized=prequantized)
    return Chosen(quantizer=quantizer, label=label or config.quant_method, offer=offer)


def _config_of(value: Any, catalog: Catalog) -> QuantizationConfig:
    """A config object from a preset name, a config object, a foreign config object or a JSON object."""
    from quantdock.quantizer import QuantizationConfig

    if isinstance(value, QuantizationConfig):
        return value
    if isinstance(value, str):
        return _preset(value, catalog)
    if isinstance(value, type):
        raise ConfigError(f"quantize= is the class {value.__qualname__}; expected an object: {value.__qualname__}(...)")
    claimed = _claimed(value, catalog)
    if claimed is not None:
        return claimed
    if not isinstance(value, Mapping) and callable(getattr(value, "to_dict", None)):  # one of transformers'
        # Some leave out of to_dict what is for loading only.
        value = {**getattr(value, "get_loading_attributes", dict)(), **value.to_dict()}
    if not isinstance(value, Mapping):
        raise _no_config(value)
    method = value.get("quant_method")
    method = getattr(method, "value", method)  # transformers writes an enum
    if not isinstance(method, str):
        raise ConfigError(f"quantization_config has no quant_method (found {method!r}); it says which plugin reads it")
    _, quantizer_class = _quantizer_class(method, catalog)
    return quantizer_class.config_class.from_dict(value)


def _claimed(value: Any, catalog: Catalog) -> QuantizationConfig | None:
    """What a plugin makes of a library's config object; plugins claim such objects by the name of a class or a base."""
    from quantdock.quantizer import QuantizationConfig

    for name in () if isinstance(value, Mapping) else _class_names(value):
        offer = catalog.find(CONFIGS, name)
        if offer is None:
            continue
        convert = offer.load()
        config = convert(value) if callable(convert) else convert
        if not isinstance(config, QuantizationConfig):
            raise PluginError(
                f"{offer.origin} claims objects of {name}, but {offer.value} made {type(config).__name__} of one, "
                "expected a QuantizationConfig"
            )
        return config
    return None


def _class_names(value: object) -> list[str]:
    """The class of an object and its bases, nearest first; without Python's own, which would claim anything."""
    classes = [base for base in type(value).__mro__ if base.__module__ != "builtins"]
    return [f"{base.__module__}.{base.__qualname__}" for base in classes]


def _no_config(value: object) -> QuantdockError:
    names, methods = _class_names(value), _phone_book("methods")
    packages = [methods[library] for library in (name.partition(".")[0] for name in names) if library in methods]
    if packages:
        return UnknownMethodError(
            f"quantize= is a {names[0]}, and no installed plugin takes objects of that class. {_advice(packages[0])}"
        )
    return ConfigError(
        f"quantize={value!r}: expected a preset name, a config object, an object as in config.json, or a mapping "
        "of patterns to any of these or None" + (f"; no installed plugin takes a {names[0]}" if names else "")
    )


def _preset(name: str, catalog: Catalog) -> QuantizationConfig:
    from quantdock.quantizer import QuantizationConfig

    offer = catalog.find(PRESETS, name)
    if offer is None:
        package = _phone_book("presets").get(name.partition("-")[0])
        raise UnknownPresetError(
            f"no installed plugin offers the preset {name!r}. Installed: {_names(catalog, PRESETS)}. {_advice(package)}"
        )
    config = offer.load()
    if not isinstance(config, QuantizationConfig):
        raise PluginError(
            f"{offer.origin}: preset {name!r} is {type(config).__name__} ({offer.value}), expected a QuantizationConfig"
        )
    return config


def _quantizer_class(method: str, catalog: Catalog) -> tuple[Offer, type[Quantizer[Any]]]:
    from quantdock.quantizer import Quantizer

    offer = catalog.find(QUANTIZERS, method)
    if offer is None:
        raise UnknownMethodError(
            f"no installed plugin serves quant_method {method!r}. Installed: {_names(catalog, QUANTIZERS)}. "
            f"{_advice(_phone_book('methods').get(method))}"
        )
    found = offer.load()
    if not (isinstance(found, type) and issubclass(found, Quantizer)):
        raise PluginError(f"{offer.origin}: {offer.value} is no subclass of quantdock.Quantizer")
    return offer, found


def _names(catalog: Catalog, group: str) -> str:
    return ", ".join(f"{offer.name} ({offer.origin})" for offer in catalog.offers(group)) or "none"


def _advice(package: str | None) -> str:
    if package is None:
        return "Install the plugin that serves it, or check the spelling."
    return f"Install it with: pip install {package}"


def _phone_book(kind: str) -> Mapping[str, str]:
    data = json.loads(files("quantdock").joinpath("known_plugins.json").read_text(encoding="utf-8"))
    return dict(data[kind])
