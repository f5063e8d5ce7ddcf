"""Quantization that looks at activations: the model runs block by block while it loads."""
