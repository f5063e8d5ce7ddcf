"""torchao quantization, as a quantdock plugin."""

from quantdock_torchao.config import TorchAoConfig

__all__ = ["TorchAoConfig"]
