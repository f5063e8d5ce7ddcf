"""AWQ checkpoints and quantization, as a quantdock plugin."""
