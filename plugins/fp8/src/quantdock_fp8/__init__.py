"""8-bit floating-point weights, as a quantdock plugin."""
