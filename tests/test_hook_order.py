"""The order in which a load calls its hooks, held against a list."""

from __future__ import annotations

import re
from collections.abc import Generator
from typing import Any

from tests.conftest import TinyFactory

import quantdock
from quantdock import hookimpl


class Recorder:
    """A stage plugin that wraps every hook and notes when it is entered and left."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def _noted(self, name: str) -> Generator[None, Any, Any]:
        self.calls.append(name)
        result = yield
        self.calls.append(f"/{name}")
        return result

    @hookimpl(wrapper=True)
    def resolve_config(self) -> Generator[None, Any, Any]:
        return (yield from self._noted("resolve_config"))

    @hookimpl(wrapper=True)
    def find_checkpoints(self) -> Generator[None, Any, Any]:
        return (yield from self._noted("find_checkpoints"))

    @hookimpl(wrapper=True)
    def build_model(self) -> Generator[None, Any, Any]:
        return (yield from self._noted("build_model"))

    @hookimpl(wrapper=True)
    def preprocess_model(self) -> Generator[None, Any, Any]:
        return (yield from self._noted("preprocess_model"))

    @hookimpl(wrapper=True)
    def quantize_param(self, parameter: quantdock.Parameter) -> Generator[None, Any, Any]:
        return (yield from self._noted(f"quantize_param {parameter.name}"))

    @hookimpl(wrapper=True)
    def postprocess_model(self, model: Any) -> Generator[None, Any, Any]:
        assert not any(parameter.is_meta for parameter in model.parameters()), "everything is loaded by now"
        return (yield from self._noted("postprocess_model"))


def test_the_order_of_all_hooks(tiny: TinyFactory) -> None:
    recorder = Recorder()
    plan = quantdock.plan(
        tiny("llama"),
        quantize={"*.mlp.up_proj": "bnb-nf4", "*.mlp.down_proj": "bnb-int8"},
        plugins=[recorder],
        workers=1,
    )
    planned = len(recorder.calls)
    plan.execute()
    quantized = {unit.targets[0].parameter.name for unit in plan.units if unit.targets[0].action == "quantize"}
    # Units run in file order.
    order = [unit.targets[0].parameter.name for unit in plan.units if unit.targets[0].action == "quantize"]
    assert len(quantized) == 4
    assert recorder.calls == [
        "resolve_config",
        "/resolve_config",
        "find_checkpoints",
        "/find_checkpoints",
        "build_model",
        "/build_model",
        "preprocess_model",
        "/preprocess_model",
        *[mark + f"quantize_param {name}" for name in order for mark in ("", "/")],
        "postprocess_model",
        "/postprocess_model",
    ]
    assert planned == 8, "planning ends before the first quantize_param"


def test_every_hook_is_in_the_list() -> None:
    from quantdock import hookspecs

    specified = {name for name, value in vars(hookspecs).items() if hasattr(value, "quantdock_spec")}
    recorded = {name for name in vars(Recorder) if re.match(r"[a-z]", name)}
    assert recorded == specified
