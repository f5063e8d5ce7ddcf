"""Architectures, weight conversions, configs and tokenizers from transformers, as a quantdock plugin."""
