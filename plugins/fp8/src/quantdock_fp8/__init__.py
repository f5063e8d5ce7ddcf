"""Weights in floats of 8 and 4 bits, as a quantdock plugin."""
