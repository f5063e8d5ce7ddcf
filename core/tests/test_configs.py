"""A method's config, read from a checkpoint's JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

import quantdock
from quantdock import ConfigError


@dataclass(frozen=True, kw_only=True)
class Config(quantdock.QuantizationConfig):
    quant_method: ClassVar[str] = "plain"
    bits: int
    tables: dict[str, int]
    group_size: int = 64


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({"quant_method": "plain"}, r"Config needs 'bits', 'tables', and the config doesn't say it"),
        ({"bits": 4, "group_size": 32}, r"Config needs 'tables'"),
        ({"bits": 4, "tables": {}, "bit": 4}, r"Config has no field 'bit'; known fields: bits, group_size, tables"),
    ],
)
def test_what_a_config_lacks_and_what_it_has_too_much(data: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        Config.from_dict(data)


def test_it_is_read_as_it_is_written() -> None:
    config = Config(bits=4, tables={"a": 1})
    assert Config.from_dict(config.to_dict()) == config
