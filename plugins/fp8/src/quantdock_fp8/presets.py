"""The presets that users type."""

from __future__ import annotations

from quantdock_fp8.config import FbgemmFp8Config, Fp8Config

TENSOR = Fp8Config()
ROW = FbgemmFp8Config()
BLOCK = Fp8Config(weight_block_size=(128, 128))
