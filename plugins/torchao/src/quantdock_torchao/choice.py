"""Which of torchao's configs a parameter gets, by the rules of torchao's ``quantize_``."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection
from typing import Any

from torch import nn

from quantdock import Parameter, PatternError
from quantdock_torchao import upstream

_NOT_DYNAMIC = nn.modules.linear.NonDynamicallyQuantizableLinear


class Choice:
    """One config for all linear layers, or ``FqnToConfig``: configs by names, whose first match in the order of
    torchao's documentation decides: the parameter's name, its module's, expressions for either, ``_default``."""

    def __init__(self, method: Any) -> None:
        self._by_name: dict[str, Any] | None = None
        self._default: Any = None
        if isinstance(method, upstream.module("torchao.quantization").FqnToConfig):
            self._by_name = {key: _without_side_effects(value) for key, value in method.fqn_to_config.items()}
            self._default = self._by_name.get("_default")
        else:
            self._default = _without_side_effects(method)

    def all(self) -> list[Any]:
        """Every config that a parameter may get."""
        found = [self._default, *(self._by_name or {}).values()]
        return list({id(config): config for config in found if config is not None}.values())

    def require_match(self, names: Collection[str]) -> None:
        """Raise when configs are chosen by names, and none of these is meant.

        Args:
            names: of the model's parameters.

        Raises:
            PatternError: says which names there are.
        """
        if self._by_name is None or self._default is not None or any(self._key(name, self._by_name) for name in names):
            return
        raise PatternError(
            f"FqnToConfig: {', '.join(map(repr, self._by_name)) or 'it names nothing, and'} matches no parameter, so "
            f"nothing would be quantized. Parameters are such as {', '.join(map(repr, list(names)[:4]))}; an "
            'expression needs "re:" in front, and matches whole names'
        )

    def of(self, parameter: Parameter) -> tuple[Any, str]:
        """The config of a parameter; or ``None``, and why."""
        if self._by_name is not None:
            key = self._key(parameter.name, self._by_name)
            if key is not None:
                config = self._by_name[key]
                return config, "" if config is not None else f"FqnToConfig: {key!r} is None"
        if not _is_linear(parameter):
            return None, _why_not(parameter, named=self._by_name is not None)
        return self._default, "" if self._default is not None else "FqnToConfig: no name matches"

    def _key(self, name: str, by_name: dict[str, Any]) -> str | None:
        if name in by_name:
            return name
        module, _, leaf = name.rpartition(".")
        whole = leaf == "weight"  # a module's config is for that parameter
        if whole and module in by_name:
            return module
        expressions = [key for key in by_name if key.startswith("re:")]
        for text in [name, module] if whole else [name]:
            for key in expressions:
                if re.fullmatch(key[3:], text):
                    return key
        return None


def _without_side_effects(config: Any) -> Any:
    """The config without torchao's changes to settings of inductor, and of torch itself, that are everybody's."""
    if getattr(config, "set_inductor_config", False):
        return dataclasses.replace(config, set_inductor_config=False)
    return config


def _is_linear(parameter: Parameter) -> bool:
    return parameter.role == "linear" and not issubclass(parameter.module_type, _NOT_DYNAMIC)


def _why_not(parameter: Parameter, *, named: bool) -> str:
    rank = len(parameter.spec.shape)
    if parameter.role == "embedding":
        what = "embedding"
    elif rank != 2:
        what = f"{rank}-D parameter"
    else:
        what = f"in {parameter.module_type.__name__}"
    return f"{what}: torchao quantizes the weights of linear layers" + (
        ", and what FqnToConfig names" if named else "; FqnToConfig can name others"
    )
