"""What a plugin declares: its entry points, its presets, its config."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from quantdock.discovery import PRESETS, QUANTIZERS
from quantdock.errors import ConfigError, UnsupportedError
from quantdock.quantizer import QuantizationConfig
from quantdock.testing.plugins import in_new_process
from quantdock.testing.suite import Suite, quantizer_of

_LISTING = """
import json, sys
import quantdock
listed = [*quantdock.quantizers(), *quantdock.presets()]
print(json.dumps({"listed": listed, "modules": list(sys.modules)}))
"""

_PLAIN_LOAD = """
import json, sys
import quantdock
from quantdock.testing.model import SmallModel
quantdock.load(sys.argv[1], model=SmallModel)
print(json.dumps(list(sys.modules)))
"""

_NAMING = """
import json, sys
import importlib_metadata
for entry in importlib_metadata.entry_points(group="quantdock.quantizers", name=sys.argv[1]):
    entry.load()
for name in sys.argv[2:]:
    for entry in importlib_metadata.entry_points(group="quantdock.presets", name=name):
        entry.load()
print(json.dumps(list(sys.modules)))
"""


class Declaring(Suite):
    """Tests that load nothing, or nothing quantized."""

    def test_listing_imports_nothing(self) -> None:
        """Listing methods and presets reads metadata; it imports neither torch nor a plugin.

        When it fails: are the names in the entry points those of ``method`` and ``presets``? Does the distribution
        bring a ``.pth`` file or a ``sitecustomize`` that imports it when Python starts?
        """
        found = json.loads(in_new_process("-c", _LISTING))
        missing = {self.method, *self.presets} - set(found["listed"])
        assert not missing, f"not listed: {sorted(missing)}"
        modules = {self._module(QUANTIZERS, self.method), *(self._module(PRESETS, name) for name in self.presets)}
        assert modules.isdisjoint(found["modules"]), "listing imported the plugin"
        assert "torch" not in found["modules"], "listing imported torch"

    def test_other_loads_leave_the_plugin_alone(self, folder: Path) -> None:
        """A load that doesn't use the method doesn't import its module.

        When it fails: a stage plugin (``quantdock.stages``) of the same distribution is imported by every load. Keep
        it in a module of its own, and don't import the quantizer's module there.
        """
        modules = json.loads(in_new_process("-c", _PLAIN_LOAD, str(folder)))
        assert self._module(QUANTIZERS, self.method) not in modules

    def test_naming_imports_nothing_heavy(self) -> None:
        """The quantizer class and the presets can be had without importing any of ``heavy_modules``.

        When it fails: import the library inside the functions that call it, not at the top of the module.
        """
        modules = json.loads(in_new_process("-c", _NAMING, self.method, *self.presets))
        imported = [name for name in self.heavy_modules if name in modules]
        assert not imported, f"importing the entry points imported {', '.join(imported)}"

    def test_presets_are_configs_of_the_method(self) -> None:
        """Every preset is a config object of this method.

        When it fails: a preset's entry point names an instance (``module:INT8``), neither a class nor a function, and
        the config's ``quant_method`` is the name of the quantizer's entry point.
        """
        config_class = self.quantizer_class().config_class
        assert config_class.quant_method == self.method
        for name in self.presets:
            preset = self.preset(name)
            assert isinstance(preset, config_class), f"preset {name!r} is of {type(preset).__name__}"
            assert self.offer(PRESETS, name).dist == self.offer(QUANTIZERS, self.method).dist

    def test_config_survives_json(self, config: QuantizationConfig) -> None:
        """``from_dict(to_dict())`` through real JSON is the same config.

        When it fails: a field that JSON has no type for (a dtype, a tuple, an enum) needs converting in ``to_dict``
        and ``from_dict``; and ``to_dict`` has to write ``quant_method``.
        """
        written = json.loads(json.dumps(config.to_dict()))
        assert written["quant_method"] == self.method
        assert type(config).from_dict(written) == config

    def test_unknown_config_field_is_named(self, config: QuantizationConfig) -> None:
        """A field that the config doesn't have is an error that names it; reading past it could change the weights.

        When it fails: an own ``from_dict`` has to end in ``super().from_dict``. Fields that other writers add and that
        carry nothing go into ``ignored_fields``.
        """
        with pytest.raises(ConfigError, match="no_such_field"):
            type(config).from_dict(config.to_dict() | {"no_such_field": 1})

    def test_config_is_frozen_data(self, config: QuantizationConfig) -> None:
        """A config can't change once it is made, and its fields are given by name.

        When it fails: decorate the class with ``@dataclass(frozen=True, kw_only=True)``, as its base is.
        """
        for item in dataclasses.fields(config):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(config, item.name, getattr(config, item.name))
        positional = [
            name
            for name, parameter in inspect.signature(type(config)).parameters.items()
            if parameter.kind is not parameter.KEYWORD_ONLY
        ]
        assert not positional, f"can be given by position: {', '.join(positional)}"

    def test_saved_storage_fields_are_fixed(self, folder: Path, config: QuantizationConfig) -> None:
        """Asking a saved checkpoint for other storage than it has is an error that names the field.

        When it fails: only fields that don't change what is stored may be marked with ``runtime()``; an own
        ``overridden_by`` has to hold on to the rest.
        """
        _, saved = self.saved(folder, config)
        for name in (item.name for item in dataclasses.fields(config) if item.name not in config.runtime_fields()):
            other = copy.copy(config)
            object.__setattr__(other, name, _Other())  # past __post_init__: any value but the one that is stored
            with pytest.raises(ConfigError, match=name):
                self.plan(saved, other)

    def test_saved_runtime_fields_can_change(self, folder: Path, config: QuantizationConfig) -> None:
        """What is marked ``runtime()`` can be asked for anew when a saved checkpoint is loaded; what this machine can't
        do may be refused.

        When it fails: an own ``overridden_by`` has to take the other config's runtime fields, and the message of an
        ``UnsupportedError`` to name the field.
        """
        changed = {name: value for name in config.runtime_fields() for value in _others(getattr(config, name))}
        _, saved = self.saved(folder, config)
        for name, value in changed.items():
            try:
                other = dataclasses.replace(config, **{name: value})
            except ConfigError:
                continue  # a value that this field can't have
            try:
                plan = self.plan(saved, other)
            except UnsupportedError as error:
                refused = str(error)
                assert name in refused
                continue
            assert getattr(quantizer_of(plan).config, name) == value

    def _module(self, group: str, name: str) -> str:
        return self.offer(group, name).value.partition(":")[0]


class _Other:
    """A value that equals no other."""

    def __repr__(self) -> str:
        return "another value"


def _others(value: Any) -> list[Any]:
    """Another value of the same kind, where one can be told."""
    if isinstance(value, torch.dtype):
        return [torch.bfloat16 if value == torch.float32 else torch.float32]
    if isinstance(value, bool):
        return [not value]
    return [value + 1] if isinstance(value, int | float) else []
