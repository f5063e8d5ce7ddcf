"""bitsandbytes 4-bit and 8-bit quantization, as a quantdock plugin."""
