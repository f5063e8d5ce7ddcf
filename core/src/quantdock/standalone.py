"""Quantization configs that stand in a file of their own, beside a ``config.json`` that says nothing of them."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from quantdock.config import ModelConfig, read_json_object
from quantdock.hookspecs import hookimpl
from quantdock.options import LoadOptions
from quantdock.source import Source


class StandaloneConfig(ABC):
    """A stage plugin that reads such a file as a ``quantization_config``. Subclasses say which, and whose.

    Every load imports the module that a subclass is in, whatever is loaded: keep it small.
    """

    files: ClassVar[tuple[str, ...]]
    """Names of files, in the order in which they are looked at."""
    quant_method: ClassVar[str]
    """What the config is given as its ``quant_method``."""

    @abstractmethod
    def recognizes(self, data: Mapping[str, Any]) -> bool:
        """Whether a file of that name is this method's; others use the same names."""

    @hookimpl(wrapper=True)
    def resolve_config(
        self, source: Source, options: LoadOptions
    ) -> Generator[None, ModelConfig | None, ModelConfig | None]:
        """Whoever resolved the config: with a ``quantization_config``, if only the file beside it has that."""
        config = yield
        if config is None or Path(config.origin).name != "config.json" or options.config is not None:
            return config
        if config.quantization is not None:
            return config
        for name, path in source.fetch(self.files).items():
            data = read_json_object(path, "a quantization config")
            if self.recognizes(data):
                quantization = data | {"quant_method": self.quant_method}
                return dataclasses.replace(
                    config,
                    data={**config.data, "quantization_config": quantization},
                    origin=f"{config.origin} and {name}",
                )
        return config
