"""optimum-quanto quantization, as a quantdock plugin."""
