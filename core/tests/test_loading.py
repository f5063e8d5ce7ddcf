"""Loading a module of one's own: the whole flow with nothing but core."""

from __future__ import annotations

import ast
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantdock

sys.path.insert(0, str(Path(__file__).parent))
from plain import IDS, Plain, write_plain


def rewrite(folder: Path, **tensors: torch.Tensor | None) -> None:
    state = load_file(folder / "model.safetensors") | {name.replace("__", "."): t for name, t in tensors.items()}
    save_file({name: t.clone() for name, t in state.items() if t is not None}, folder / "model.safetensors")


def test_same_outputs_ties_and_buffers(tmp_path: Path) -> None:
    original = write_plain(tmp_path)
    model = quantdock.load(tmp_path, model=Plain)
    assert isinstance(model, Plain)
    assert torch.equal(model(IDS), original(IDS))
    assert model.head.weight is model.embed.weight
    assert model.steps == 5
    assert not model.training


def test_the_factory_may_take_no_config(tmp_path: Path) -> None:
    original = write_plain(tmp_path)
    (tmp_path / "config.json").unlink()
    assert torch.equal(quantdock.load(tmp_path, model=functools.partial(Plain, None))(IDS), original(IDS))


def test_config_overrides_reach_the_factory(tmp_path: Path) -> None:
    write_plain(tmp_path)
    with pytest.raises(quantdock.LedgerError, match=r"embed\.weight.*\[48, 16\].*\[48, 32\]"):
        quantdock.load(tmp_path, model=Plain, config_overrides={"width": 16})


def test_the_other_half_of_a_tied_pair_is_as_good(tmp_path: Path) -> None:
    original = write_plain(tmp_path, drop="embed.weight")
    model = quantdock.load(tmp_path, model=Plain)
    assert torch.equal(model(IDS), original(IDS))
    assert model.head.weight is model.embed.weight


def test_both_halves_stored_equal_are_tied_and_one_is_ignored(tmp_path: Path) -> None:
    write_plain(tmp_path, drop="")
    model = quantdock.load(tmp_path, model=Plain)
    assert model.head.weight is model.embed.weight
    assert quantdock.report(model).ledger.ignored.keys() == {"head.weight"}
    assert quantdock.report(model).predicted_nbytes == quantdock.report(model).measured_nbytes


def test_both_halves_stored_different_stay_apart_and_are_reported(tmp_path: Path) -> None:
    write_plain(tmp_path, drop="")
    rewrite(tmp_path, head__weight=torch.ones(48, 32))
    model = quantdock.load(tmp_path, model=Plain)
    assert model.head.weight is not model.embed.weight
    assert torch.equal(model.head.weight, torch.ones(48, 32))
    assert "head.weight" in quantdock.report(model).ledger.allowed


def test_no_half_stored_is_an_error(tmp_path: Path) -> None:
    write_plain(tmp_path)
    rewrite(tmp_path, embed__weight=None)
    with pytest.raises(quantdock.LedgerError, match=r"embed\.weight"):
        quantdock.load(tmp_path, model=Plain)


def test_what_may_be_missing_is_made_by_the_module_itself(tmp_path: Path) -> None:
    write_plain(tmp_path)
    rewrite(tmp_path, norm__weight=None, norm__bias=None)
    model = quantdock.load(tmp_path, model=Plain, allow_missing=["norm"])
    assert torch.equal(model.norm.weight, torch.ones(32))
    assert quantdock.report(model).ledger.allowed.keys() == {"norm.weight", "norm.bias"}


def test_half_of_a_module_missing_is_refused_rather_than_guessed(tmp_path: Path) -> None:
    write_plain(tmp_path)
    rewrite(tmp_path, norm__bias=None)
    with pytest.raises(quantdock.UnsupportedError, match=r"norm\.bias"):
        quantdock.load(tmp_path, model=Plain, allow_missing=["norm.bias"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype(tmp_path: Path, dtype: str) -> None:
    write_plain(tmp_path, dtype=torch.float64)
    wanted = getattr(torch, dtype)
    model = quantdock.load(tmp_path, model=Plain, dtype=dtype)
    stored = load_file(tmp_path / "model.safetensors")
    for name, tensor in model.state_dict().items():
        values = stored[name if name != "head.weight" else "embed.weight"]
        assert torch.equal(tensor, values.to(wanted) if values.is_floating_point() else values)
        assert tensor.dtype == (wanted if values.is_floating_point() else values.dtype)


def test_auto_dtype_follows_the_config_then_the_checkpoint(tmp_path: Path) -> None:
    write_plain(tmp_path, dtype=torch.bfloat16)
    assert quantdock.load(tmp_path, model=Plain).norm.weight.dtype == torch.bfloat16
    (tmp_path / "config.json").write_text('{"dtype": "float16"}')
    assert quantdock.load(tmp_path, model=Plain).norm.weight.dtype == torch.float16


def test_writing_to_a_mapped_parameter_leaves_the_file_alone(tmp_path: Path) -> None:
    write_plain(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    model = quantdock.load(tmp_path, model=Plain)
    assert {entry.action for entry in quantdock.report(model).ledger.entries} >= {"map"}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_plan_reads_no_weights_prints_and_is_executed_once(tmp_path: Path) -> None:
    write_plain(tmp_path)
    plan = quantdock.plan(tmp_path, model=Plain)
    assert all(parameter.is_meta for parameter in plan.skeleton.model.parameters())
    text = str(plan)
    for expected in ("layers.*.weight x2", "tied to embed.weight", "resident when loaded"):
        assert expected in text
    assert json.loads(json.dumps(plan.to_dict()))["resident_nbytes"] == plan.resident_nbytes
    model = plan.execute()
    assert quantdock.report(model).measured_nbytes == plan.resident_nbytes
    with pytest.raises(quantdock.QuantdockError, match="executed already"):
        plan.execute()


def test_progress_counts_to_the_end(tmp_path: Path) -> None:
    write_plain(tmp_path)
    seen = []
    quantdock.load(tmp_path, model=Plain, progress=seen.append, workers=3)
    assert seen[-1].stored_nbytes == seen[-1].total_nbytes > 0
    assert seen[-1].parameters == seen[-1].total_parameters == 8


_FIRST_LOOK = """
import io, sys
sys.stderr = shown = io.StringIO()

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            sys.meta_path.remove(self)
            print(repr(shown.getvalue()))

sys.meta_path.insert(0, Watch())
import quantdock
model = lambda: __import__("torch").nn.Linear(2, 2)
quantdock.load({source!r}, model=model, progress={progress}, ignore_unexpected=["*"], allow_missing=["*"])
print(repr(shown.getvalue()))
"""


@pytest.mark.parametrize("progress", [True, False, None])
def test_a_load_says_what_it_waits_for_before_torch_is_imported(tmp_path: Path, progress: bool | None) -> None:
    write_plain(tmp_path)
    code = _FIRST_LOOK.format(source=str(tmp_path), progress=progress)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    first, last = map(ast.literal_eval, out)
    if progress:
        assert first == f"loading {tmp_path}: importing torch\n"
        assert "reading the headers" in last
    else:
        assert first == last == ""


def test_one_file_may_be_named(tmp_path: Path) -> None:
    original = write_plain(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    assert torch.equal(quantdock.load(tmp_path / "other.safetensors", model=Plain)(IDS), original(IDS))


def test_load_and_plan_take_the_options_that_there_are() -> None:
    import dataclasses
    import inspect

    fields = {field.name for field in dataclasses.fields(quantdock.LoadOptions)}
    assert set(inspect.signature(quantdock.load).parameters) - {"source"} == fields
    assert set(inspect.signature(quantdock.plan).parameters) - {"source"} == fields


@pytest.mark.parametrize("code", ["import quantdock", "import quantdock; quantdock.quantizers(); quantdock.presets()"])
def test_discovery_imports_neither_torch_nor_a_plugin(code: str) -> None:
    check = (
        "import sys; print(sorted(m for m in sys.modules if m.partition('.')[0].startswith(('torch', 'quantdock_'))))"
    )
    out = subprocess.run([sys.executable, "-c", f"{code}\n{check}"], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
