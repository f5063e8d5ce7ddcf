"""The presets that users type."""

from __future__ import annotations

from quantdock_quanto.config import QuantoConfig

INT8 = QuantoConfig(weights="int8")
FLOAT8 = QuantoConfig(weights="float8")
