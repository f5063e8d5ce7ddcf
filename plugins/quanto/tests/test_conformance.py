"""The conformance suite of quantdock, for every preset."""

from __future__ import annotations

from quantdock.testing import QuantizerConformance
from quantdock_quanto.presets import FLOAT8, INT8


class TestInt8(QuantizerConformance):
    method = "quanto"
    presets = ("quanto-int8",)
    configs = (INT8,)
    min_sqnr_db = 35.0
    heavy_modules = ("optimum.quanto",)


class TestFloat8(QuantizerConformance):
    method = "quanto"
    presets = ("quanto-float8",)
    configs = (FLOAT8,)
    min_sqnr_db = 28.0
    heavy_modules = ("optimum.quanto",)
