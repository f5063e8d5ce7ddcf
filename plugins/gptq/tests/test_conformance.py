"""The conformance suite of quantdock, for every preset, and for what has none."""

from __future__ import annotations

from types import MappingProxyType

from quantdock.testing import QuantizerConformance
from quantdock_gptq.config import GPTQConfig

SAMPLES = [{"ids": [[place * step % 32 for place in range(12)]]} for step in range(1, 24, 2)]


class TestPresets(QuantizerConformance):
    method = "gptq"
    presets = ("gptq-int4", "gptq-int8")
    features = 128
    min_sqnr_db = 17.0
    unsupported_shape = (193, 64)


class TestOthers(QuantizerConformance):
    method = "gptq"
    configs = (
        GPTQConfig(bits=3, group_size=32, sym=False),
        GPTQConfig(bits=8, group_size=64, checkpoint_format="gptq_v2"),
        GPTQConfig(bits=4, group_size=-1, dynamic={"-:.*experts": {}, "+:.*down$": {"bits": 8, "group_size": 32}}),
    )
    min_sqnr_db = 13.0
    unsupported_shape = (100, 64)


class TestCalibrated(QuantizerConformance):
    method = "gptq"
    configs = (
        GPTQConfig(bits=4, group_size=32, desc_act=True, dataset=SAMPLES),
        GPTQConfig(bits=8, group_size=64, static_groups=True, dataset=SAMPLES),
    )
    unsaved = MappingProxyType({"dataset": SAMPLES})
    min_sqnr_db = 14.0
    unsupported_shape = (100, 64)
