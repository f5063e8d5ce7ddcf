"""The conformance suite of quantdock, for every preset."""

from __future__ import annotations

from quantdock.testing import QuantizerConformance
from quantdock_bnb.presets import FP4, INT8, NF4, NF4_DQ


class TestFourBit(QuantizerConformance):
    method = "bitsandbytes"
    configs = (NF4, NF4_DQ, FP4)
    presets = ("bnb-nf4", "bnb-nf4-dq", "bnb-fp4")
    min_sqnr_db = 17.0


class TestEightBit(QuantizerConformance):
    method = "bitsandbytes"
    configs = (INT8,)
    presets = ("bnb-int8",)
    min_sqnr_db = 35.0
