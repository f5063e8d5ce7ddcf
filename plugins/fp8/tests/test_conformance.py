"""The conformance suite of quantdock, for every preset."""

from __future__ import annotations

from quantdock.testing import QuantizerConformance
from quantdock_fp8.config import Fp8Config
from quantdock_fp8.presets import BLOCK, TENSOR


class TestFp8(QuantizerConformance):
    method = "fp8"
    configs = (TENSOR, BLOCK, Fp8Config(weight_block_size=(48, 40), scale_fmt="ue8m0"))
    presets = ("fp8", "fp8-block")
    min_sqnr_db = 28.0
    unsupported_device = "mps"


class TestFbgemm(QuantizerConformance):
    method = "fbgemm_fp8"
    presets = ("fp8-row",)
    min_sqnr_db = 28.0
    unsupported_device = "mps"
