"""Plans grow with the number of tensors, and not faster: in calls that are made, and in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import quantdock
from quantdock.patterns import PatternIndex, matching


class Wide(nn.Module):
    """``count`` linear layers, built without initialising what nobody uses."""

    def __init__(self, config: dict[str, int]) -> None:
        super().__init__()
        width = config["width"]
        self.layers = nn.ModuleList(nn.utils.skip_init(nn.Linear, width, width, bias=False) for _ in range(config["n"]))
        if config.get("tied"):
            for layer in self.layers:
                layer.weight = self.layers[0].weight


def write_sparse(folder: Path, count: int, *, shards: int = 4, width: int = 8) -> Path:
    """Real headers of ``count`` matrices; the values are a hole in the file."""
    folder.mkdir()
    weight_map = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        header, end = {}, 0
        for index in range(shard, count, shards):
            begin, end = end, end + 2 * width * width
            header[f"layers.{index}.weight"] = {"dtype": "BF16", "shape": [width, width], "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        with (folder / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
        weight_map |= dict.fromkeys(header, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"n": count, "width": width}))
    return folder


def calls_of(work: Callable[[], object]) -> int:
    """How many functions ``work`` calls, those written in C included."""
    count = 0

    def tally(_: object, event: str, __: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(tally)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize(
    ("overrides", "options"),
    [
        ({}, lambda _: {}),
        ({"tied": 1}, lambda _: {}),
        ({}, lambda count: {"quantize": {f"layers.{i}": None for i in range(count)}}),
        ({}, lambda count: {"quantize": {"*": None}, "skip": [f"layers.{i}.weight" for i in range(count)]}),
    ],
    ids=["plain", "one tied group", "a rule for each layer", "a skip for each layer"],
)
def test_twice_the_tensors_take_twice_the_calls(
    tmp_path: Path, overrides: dict[str, int], options: Callable[[int], dict[str, Any]]
) -> None:
    calls = []
    for count in (10, 100, 200):  # the first for what is set up once
        folder = write_sparse(tmp_path / str(count), count)

        def work(folder: Path = folder, count: int = count) -> None:
            made = quantdock.plan(folder, model=Wide, config_overrides=overrides, **options(count))
            str(made)
            made.to_dict()

        calls.append(calls_of(work))
    assert calls[2] < 2.1 * calls[1]


def test_memory_of_a_plan_is_bounded_by_its_tensors(tmp_path: Path) -> None:
    """3 KB for each tensor, after what a small plan has imported; the model itself not counted."""
    folder, small = (
        write_sparse(tmp_path / "large", 10_000, shards=50, width=3000),
        write_sparse(tmp_path / "small", 10),
    )
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
import quantdock
from test_scale import Wide

def resident():
    status = open("/proc/self/status").read()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024

str(quantdock.plan({str(small)!r}, model=Wide))
with torch.device("meta"):
    model = Wide({{"n": 10_000, "width": 3000}})
before = resident()
plan = quantdock.plan({str(folder)!r}, model=lambda: model)
str(plan), plan.to_dict()
print(resident() - before)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 10_000 * 3_000


def test_an_index_of_patterns_says_what_each_pattern_says() -> None:
    patterns = ["a.b", "a", "*.weight", "", "a.b.weight", "a.?", "a.b", "[ab]", "c", "a.b.weigh"]
    index = PatternIndex(patterns)
    for name in ("a.b.weight", "a.b", "a", "ab", "b.weight", "c.d", "", "x", ".a", "a..b"):
        one_by_one = [number for number, pattern in enumerate(patterns) if matching([pattern], name) is not None]
        assert index.matching(name) == one_by_one
        assert index.first(name) == next(iter(one_by_one), None)
