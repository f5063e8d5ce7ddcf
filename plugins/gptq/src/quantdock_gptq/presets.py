"""The presets that users type."""

from __future__ import annotations

from quantdock_gptq.config import GPTQConfig

INT4 = GPTQConfig(bits=4, group_size=128)
INT8 = GPTQConfig(bits=8, group_size=-1)
"""One scale per output: the form that torch's CPU kernel for 8 bits reads."""
