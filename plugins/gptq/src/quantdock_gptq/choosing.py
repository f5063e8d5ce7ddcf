"""What a config says of a parameter: by the names of the linear layers that it is stored as."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from quantdock import Assembly, Parameter, UnsupportedError, linears
from quantdock_gptq.config import GPTQConfig, Settings

LINEAR = ("linear", "linear-transposed")


class Choosing:
    """Answers for one load, and remembers them.

    Args:
        config: of the load.
    """

    def __init__(self, config: GPTQConfig) -> None:
        self._config = config
        self._of: dict[str, Settings | None] = {}
        self._experts: dict[str, linears.Experts | None] = {}
        self._settings: dict[str, Settings] = {}

    def experts(self, parameter: Parameter, assemblies: Mapping[str, Assembly]) -> linears.Experts | None:
        """Which linear layers a parameter is stored as, if those are experts."""
        if len(parameter.spec.shape) != 3:
            return None
        if parameter.name not in self._experts:
            self._experts[parameter.name] = linears.Experts.of(parameter, assemblies.get(parameter.name))
        return self._experts[parameter.name]

    def known_experts(self, parameter: Parameter) -> linears.Experts | None:
        """The same, of one that was asked for before."""
        return self._experts.get(parameter.name)

    def modules(self, parameter: Parameter) -> list[str]:
        """Paths of the linear layers that a parameter is stored as."""
        experts = self.known_experts(parameter)
        return [parameter.module] if experts is None else experts.modules

    def refusal(self, parameter: Parameter, *, prequantized: bool) -> str | None:
        """Why the config leaves a parameter alone."""
        modules = self.modules(parameter)
        if all(self._for(module) is None for module in modules):
            return "dynamic leaves it alone ('-:')"
        named = prequantized or any(_named(module, self._config.modules_in_block_to_quantize) for module in modules)
        return None if named else "modules_in_block_to_quantize leaves it out"

    def settings(self, parameter: Parameter) -> Settings:
        """What holds for a parameter that isn't refused.

        Raises:
            UnsupportedError: ``dynamic`` says different things of the experts of a parameter.
        """
        if parameter.name not in self._settings:
            found: dict[Settings | None, str] = {}
            for module in self.modules(parameter):
                found.setdefault(self._for(module), module)
            if len(found) > 1:
                what = [f"{settings or 'no quantization'} for {module!r}" for settings, module in found.items()]
                raise UnsupportedError(
                    f"{parameter.name}: dynamic says {' and '.join(what[:2])}; the experts of one parameter have to be "
                    "alike, so make them so, or leave this parameter out"
                )
            (settings,) = found
            assert settings is not None, "refusal() leaves it alone"
            self._settings[parameter.name] = settings
        return self._settings[parameter.name]

    def left_alone(self, parameters: Iterable[Parameter], taken: Iterable[Parameter]) -> list[str]:
        """Patterns for ``dynamic`` that leave out layers that would be looked for quantized.

        Args:
            parameters: which could be quantized and aren't.
            taken: which are.
        """
        others = {module for parameter in taken for module in self.modules(parameter)}
        found = set()
        for parameter in parameters:
            many = self.known_experts(parameter) is not None
            for module in self.modules(parameter):
                is_head = module.rpartition(".")[2] == "lm_head"  # which lm_head=false leaves out
                if module not in others and not is_head and self._for(module):
                    found.add(_leaving_out(module, many=many))
        return sorted(found)

    def _for(self, module: str) -> Settings | None:
        if module not in self._of:
            self._of[module] = self._config.of(module)
        return self._of[module]


def _leaving_out(module: str, *, many: bool) -> str:
    """The pattern for a module, or for all experts of a layer: the last number in its path is any."""
    head, number, tail = module.rpartition(_number(module)) if many else (module, "", "")
    pattern = rf"{re.escape(head)}\.\d+\.{re.escape(tail)}" if number else re.escape(module)
    return f"-:^{pattern}$"


def _number(module: str) -> str:
    """The last number in a path, with the dots around it; a character that no path has when there is none."""
    numbers = [part for part in module.split(".")[1:-1] if part.isdecimal()]
    return f".{numbers[-1]}." if numbers else "\0"


def _named(module: str, lists: Any) -> bool:
    """Whether ``modules_in_block_to_quantize`` has a module; it has all when it isn't given."""
    names = [name for part in lists or () for name in ([part] if isinstance(part, str) else part)]
    return not names or any(f".{module}".endswith(f".{name}") for name in names)
