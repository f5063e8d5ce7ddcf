"""The presets that users type.

The 4-bit ones compute in bfloat16, which is what people mean when they ask for nf4; the config's own default, float32,
is transformers' and several times slower.
"""

from __future__ import annotations

import torch

from quantdock_bnb.config import BitsAndBytesConfig

NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
NF4_DQ = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
FP4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype=torch.bfloat16)
INT8 = BitsAndBytesConfig(load_in_8bit=True)
