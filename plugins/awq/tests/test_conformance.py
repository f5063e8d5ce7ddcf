"""The conformance suite of quantdock, with a little data to calibrate with."""

from __future__ import annotations

from types import MappingProxyType

from quantdock.testing import QuantizerConformance
from quantdock_awq.config import AwqConfig

SAMPLES = [{"ids": [[place * step % 32 for place in range(12)]]} for step in range(1, 24, 2)]


class TestAwq(QuantizerConformance):
    method = "awq"
    configs = (
        AwqConfig(group_size=32, dataset=SAMPLES),
        AwqConfig(group_size=-1, zero_point=False, modules_to_not_convert=["blocks.0.down"], dataset=SAMPLES),
    )
    unsaved = MappingProxyType({"dataset": SAMPLES})
    min_sqnr_db = 14.0
    unsupported_shape = (64, 100)
