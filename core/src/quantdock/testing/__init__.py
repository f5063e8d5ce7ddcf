"""What a plugin's own tests use: the conformance suite, and plugins that need no installing.

The suite is a class to inherit. Twelve lines test a plugin::

    from quantdock.testing import QuantizerConformance

    class TestToy(QuantizerConformance):
        method = "toy"
        presets = ("toy-int8",)
        min_sqnr_db = 38.0

Everything it can be told is on ``quantdock.testing.suite.Suite``. A test may be replaced only by one that is marked
``pytest.mark.xfail`` with a reason.

Needs pytest: ``pip install "quantdock[testing]"``.
"""

# ruff: noqa: E402 - asserts are registered before they are imported, so that a failing one shows its operands

from __future__ import annotations

import pytest

pytest.register_assert_rewrite(
    *(f"quantdock.testing.{name}" for name in ("declaring", "deciding", "quantizing", "executing", "saving", "suite"))
)

from quantdock.testing.conformance import QuantizerConformance
from quantdock.testing.memory import PeakBytes
from quantdock.testing.model import SmallModel, write_checkpoint
from quantdock.testing.plugins import in_new_process, installed_plugin, interpreted_kernels

__all__ = [
    "PeakBytes",
    "QuantizerConformance",
    "SmallModel",
    "in_new_process",
    "installed_plugin",
    "interpreted_kernels",
    "write_checkpoint",
]
