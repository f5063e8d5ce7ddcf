"""Quantize once: a model that comes from the result cache is the model that a fresh load makes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import TinyFactory
from tests.reference import assert_same_model, assert_same_tensor

import quantdock
from quantdock.caching.store import Store

PARTLY_ON_DISK = {
    "model.embed_tokens": "disk",
    **dict.fromkeys(("model.layers", "model.norm", "model.rotary_emb", "lm_head"), "cpu"),
}
NF4, INT8 = "bnb-nf4", "bnb-int8"
FP4_DQ = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True}
MIXED = {"*.mlp.*": NF4, "*.self_attn.q_proj": INT8, "*.self_attn.*": None, "lm_head": NF4}


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache's folder."""
    folder = tmp_path / "results"
    monkeypatch.setenv("QUANTDOCK_CACHE_DIR", str(folder))
    monkeypatch.delenv("QUANTDOCK_CACHE", raising=False)
    monkeypatch.delenv("QUANTDOCK_CACHE_SIZE", raising=False)
    return folder


def cache_of(model: Any) -> str:
    return quantdock.report(model).cache["state"]


def load(source: Path | str, expected: str, **options: Any) -> Any:
    """Load with the cache, which has to do what is expected."""
    model = quantdock.load(source, cache=True, **options)
    assert cache_of(model) == expected, quantdock.report(model).cache
    return model


def told(model: Any) -> dict[str, Any]:
    """The report, without what differs between any two loads."""
    facts = quantdock.report(model).to_dict()
    for name in ("seconds", "process_peak_nbytes", "in_flight_peak_nbytes", "cache"):
        del facts[name]
    return facts


def saved(model: Any, folder: Path) -> dict[str, bytes]:
    quantdock.save(model, folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def attributes(item: Any) -> dict[str, Any]:
    """Names and plain values of an object's attributes, down to those of quantized weights and their states."""
    result = {}
    for name, value in vars(item).items():
        if isinstance(value, torch.Tensor):
            result[name] = [type(value), value.requires_grad, attributes(value)]
        elif type(value).__name__ == "QuantState":
            result[name] = attributes(value)
        elif isinstance(value, bool | int | float | str | torch.dtype | type | None):
            result[name] = value
        else:
            result[name] = type(value)
    return result


def assert_indistinguishable(ours: Any, fresh: Any, folder: Path) -> None:
    assert_same_model(ours, fresh)
    assert told(ours) == told(fresh)
    assert quantdock.report(ours).ledger == quantdock.report(fresh).ledger
    assert quantdock.report(ours).predicted_nbytes == quantdock.report(ours).measured_nbytes
    assert ours.config.to_dict() == fresh.config.to_dict()
    assert ours.config._name_or_path == fresh.config._name_or_path
    assert attributes(ours) == attributes(fresh)
    modules = dict(fresh.named_modules())
    assert [name for name, _ in ours.named_modules()] == list(modules)
    for name, module in ours.named_modules():
        assert attributes(module) == attributes(modules[name]), name
        for leaf, parameter in module.named_parameters(recurse=False):
            other = getattr(modules[name], leaf)
            assert type(parameter) is type(other)
            assert {**attributes(parameter), "module": None} == {**attributes(other), "module": None}
    assert saved(ours, folder / "ours") == saved(fresh, folder / "fresh")
    restored, expected = quantdock.dequantize(ours), quantdock.dequantize(fresh)
    for name, tensor in expected.state_dict().items():
        assert_same_tensor(restored.state_dict()[name], tensor, name)


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("llama", {"quantize": NF4}),
        ("llama", {"quantize": INT8, "dtype": "float16"}),  # what isn't quantized is cast
        ("llama", {"quantize": MIXED, "skip": ["*.layers.1.mlp.up_proj"]}),
        ("llama", {"quantize": FP4_DQ}),
        ("gemma2", {"quantize": NF4}),  # tied embeddings
        ("mixtral", {"quantize": NF4}),  # experts, stacked and left alone
        ("qwen3_moe", {"quantize": "bnb-fp4"}),
        ("gpt2", {"quantize": NF4}),  # transposed layers
    ],
)
def test_the_same_model_as_a_fresh_load(
    model_type: str, options: dict[str, Any], tiny: TinyFactory, tmp_path: Path, results: Path
) -> None:
    source = tiny(model_type)
    fresh = quantdock.load(source, **options)
    first = load(source, "made", **options)
    second = load(source, "hit", **options)
    (entry,) = Store(results).entries()
    assert quantdock.report(second).cache["entry"] == entry.key
    assert str(entry.folder) in Path("/proc/self/maps").read_text(), "it is mapped, not copied"
    for index, model in enumerate((first, second)):
        other = quantdock.load(source, **options) if index else fresh
        assert_indistinguishable(model, other, tmp_path / str(index))


def test_what_is_initialised_is_initialised_anew(tiny: TinyFactory, tmp_path: Path, results: Path) -> None:
    """A new head isn't part of an entry: two loads don't get the same random one unless they are seeded so."""
    base = quantdock.load(tiny("llama"), task="base", ignore_unexpected=["lm_head"])
    quantdock.save(base, tmp_path / "base")
    heads = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        with pytest.warns(UserWarning, match=r"score\.weight"):
            model = quantdock.AutoModelForSequenceClassification.from_pretrained(
                tmp_path / "base", num_labels=3, quantization_config=NF4, cache=True
            )
        heads.append(model.score.weight)
    assert cache_of(model) == "hit"
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match=r"score\.weight"):
        more = quantdock.AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "base", num_labels=4, quantization_config=NF4, cache=True
        )
    assert cache_of(more) == "made"


def test_a_gguf_file(tiny: TinyFactory, tmp_path: Path) -> None:
    import gguf
    import numpy as np

    model = quantdock.load(tiny("llama"), dtype="float32")
    config = model.config
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(tensor.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    overrides = {"vocab_size": config.vocab_size, "head_dim": config.head_dim}
    options: dict[str, Any] = {"quantize": NF4, "config_overrides": overrides}
    fresh = quantdock.load(tmp_path / "model.gguf", **options)
    load(tmp_path / "model.gguf", "made", **options)
    hit = load(tmp_path / "model.gguf", "hit", **options)
    assert_indistinguishable(hit, fresh, tmp_path)


def test_a_repository_of_the_hub(tiny: TinyFactory, tmp_path: Path) -> None:
    """As the Hub's client keeps it; a commit that changes no weights and no config is the same load."""
    repository = tmp_path / "hub" / "models--org--tiny"
    commits = ["1" * 40, "2" * 40]
    for commit in commits:
        (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commits[1])
    for file in tiny("llama").iterdir():
        shutil.copy(file, repository / "blobs" / f"digest of {file.name}")
        for commit in commits:
            link = repository / "snapshots" / commit / file.name
            link.symlink_to(Path("..", "..", "blobs", f"digest of {file.name}"))
    options: dict[str, Any] = {"quantize": NF4, "cache_dir": tmp_path / "hub", "local_files_only": True}
    first = load("org/tiny", "made", revision=commits[0], **options)
    second = load("org/tiny", "hit", **options)
    assert [quantdock.report(model).source["revision"] for model in (first, second)] == commits
    assert_same_model(second, quantdock.load("org/tiny", **options))


# What is the same load, and what isn't --------------------------------------------------------------------------------


def test_what_makes_another_entry(tiny_copy: TinyFactory, results: Path) -> None:
    source = tiny_copy("llama")
    load(source, "made", quantize=NF4)
    variations: list[dict[str, Any]] = [
        {"quantize": INT8},
        {"quantize": {"*": NF4}, "skip": ["*.q_proj"]},
        {"quantize": {"*.mlp.*": NF4}},
        {"quantize": NF4, "dtype": "float32"},
        {"quantize": NF4, "config_overrides": {"rms_norm_eps": 0.5}},
        {"quantize": NF4, "attn_implementation": "eager"},
        {"quantize": NF4, "task": "base", "ignore_unexpected": ["lm_head"]},
        {"quantize": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
                      "bnb_4bit_blocksize": 128}},
    ]  # fmt: skip
    for count, options in enumerate(variations, start=2):
        load(source, "made", **options)
        assert len(Store(results).entries()) == count, options
    for options in variations:
        load(source, "hit", **options)


def test_what_does_not_matter(tiny_copy: TinyFactory, tmp_path: Path) -> None:
    source = tiny_copy("llama")
    load(source, "made", quantize=NF4)
    for options in (
        {"memory_budget": "32MiB", "workers": 1, "progress": lambda _: None},
        {"device_map": "cpu"},
        {"device_map": {"": "cpu"}, "max_memory": {"cpu": "1GiB"}},
        {"local_files_only": True, "revision": "main", "cache_dir": tmp_path},
    ):
        load(source, "hit", quantize=NF4, **options)
    source = source.rename(source.with_name("renamed"))
    model = load(source, "hit", quantize=NF4)
    assert quantdock.report(model).source["name"] == str(source)


def test_run_time_attributes_are_those_of_this_load(tiny: TinyFactory) -> None:
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    load(tiny("llama"), "made", quantize=stored)
    model = load(tiny("llama"), "hit", quantize=stored | {"bnb_4bit_compute_dtype": "bfloat16"})
    layer = model.model.layers[0].mlp.up_proj
    assert layer.compute_dtype == torch.bfloat16
    assert model.config.quantization_config.bnb_4bit_compute_dtype == torch.bfloat16


def test_a_weight_file_that_was_written_over(tiny_copy: TinyFactory) -> None:
    """In place, with its size kept and its time put back: nothing a look at the folder would show."""
    source = tiny_copy("llama")
    file = source / "model.safetensors"
    before = load(source, "made", quantize=NF4).state_dict()["model.layers.0.mlp.up_proj.weight"].clone()
    status = file.stat()
    content = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    for index in range(start, len(content), 2):
        content[index + 1] ^= 0x80  # every sign
    with file.open("r+b") as handle:
        handle.write(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    model = load(source, "made", quantize=NF4)
    assert not torch.equal(model.state_dict()["model.layers.0.mlp.up_proj.weight"], before)
    assert_same_model(load(source, "hit", quantize=NF4), quantdock.load(source, quantize=NF4))


def test_a_config_that_was_changed(tiny_copy: TinyFactory) -> None:
    source = tiny_copy("llama")
    load(source, "made", quantize=NF4)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert load(source, "made", quantize=NF4).config.rms_norm_eps == 0.5


def test_a_generation_config_is_read_each_time(tiny_copy: TinyFactory) -> None:
    source = tiny_copy("llama")
    load(source, "made", quantize=NF4)
    path = source / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"top_k": 7}))
    assert load(source, "hit", quantize=NF4).generation_config.top_k == 7


def test_a_source_that_changes_during_the_load(tiny_copy: TinyFactory, results: Path) -> None:
    source = tiny_copy("llama")
    model = load(source, "failed", quantize=NF4, progress=lambda _: (source / "model.safetensors").chmod(0o600))
    assert "model.safetensors of the source changed during the load" in quantdock.report(model).cache["reason"]
    assert list(results.iterdir()) == []


# What isn't cached ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "nothing is quantized"),
        ({"quantize": NF4, "plugins": [object()]}, "plugins= are objects without an identity"),
        ({"quantize": NF4, "trust_remote_code": True}, "trust_remote_code=True runs code"),
        (
            {"quantize": {"*.mlp.*": NF4}, "offload_dir": "off", "device_map": PARTLY_ON_DISK},
            "goes to disk",
        ),
    ],
)
def test_not_cached(
    options: dict[str, Any],
    reason: str,
    tiny: TinyFactory,
    results: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    model = load(tiny("llama"), "unused", **options)
    assert reason in quantdock.report(model).cache["reason"]
    assert reason in str(quantdock.report(model))
    assert not results.exists()


def test_not_cached_when_quantized_already(tiny: TinyFactory, tmp_path: Path) -> None:
    folder = quantdock.save(quantdock.load(tiny("llama"), quantize=NF4), tmp_path / "nf4")
    assert "quantized already" in quantdock.report(load(folder, "unused")).cache["reason"]


def test_not_cached_with_a_factory(tiny: TinyFactory) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    def factory(config: dict[str, Any]) -> torch.nn.Module:
        return LlamaForCausalLM(LlamaConfig.from_dict(config))

    model = load(tiny("llama"), "unused", quantize=NF4, model=factory)
    assert "model= is code without an identity" in quantdock.report(model).cache["reason"]


def test_an_object_that_cannot_be_compared(tiny: TinyFactory) -> None:
    model = load(tiny("llama"), "unused", quantize=NF4, extras={"marker": object()})
    assert (
        "extras= holds an object of the class object, which can't be compared"
        in quantdock.report(model).cache["reason"]
    )


def test_code_that_was_changed_since_it_was_imported(tiny: TinyFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that still runs the old code must not make an entry for the new."""
    monkeypatch.setattr("quantdock.caching.key._BEGAN", 0)
    model = load(tiny("llama"), "unused", quantize=NF4)
    assert "changed or installed after this process began" in quantdock.report(model).cache["reason"]


def test_a_policy_comes_first(tiny: TinyFactory, tmp_path: Path) -> None:
    load(tiny("llama"), "made", quantize=NF4)
    policy = tmp_path / "policy.toml"
    policy.write_text('[plugins]\ndeny = ["quantdock-bnb"]\n')
    with pytest.raises(quantdock.PolicyError, match="quantdock-bnb"):
        quantdock.load(tiny("llama"), quantize=NF4, cache=True, policy=policy)
    policy.write_text('[plugins]\ndeny = ["quantdock-gguf"]\n')
    load(tiny("llama"), "made", quantize=NF4, policy=policy)


# The switches ---------------------------------------------------------------------------------------------------------


def test_the_environment(tiny: TinyFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_of(quantdock.load(tiny("llama"), quantize=NF4)) == "off"
    monkeypatch.setenv("QUANTDOCK_CACHE", "1")
    assert cache_of(quantdock.load(tiny("llama"), quantize=NF4)) == "made"
    assert cache_of(quantdock.load(tiny("llama"), quantize=NF4)) == "hit"
    assert cache_of(quantdock.load(tiny("llama"), quantize=NF4, cache=False)) == "off"
    monkeypatch.setenv("QUANTDOCK_CACHE", "perhaps")
    with pytest.raises(quantdock.ConfigError, match="QUANTDOCK_CACHE='perhaps': expected 1 or 0"):
        quantdock.load(tiny("llama"), quantize=NF4)
    monkeypatch.setenv("QUANTDOCK_CACHE_SIZE", "much")
    with pytest.raises(quantdock.ConfigError, match="QUANTDOCK_CACHE_SIZE='much' is not a size"):
        quantdock.load(tiny("llama"), quantize=NF4, cache=True)


def test_a_plan_says_what_will_happen(tiny: TinyFactory, results: Path) -> None:
    plan = quantdock.plan(tiny("llama"), quantize=NF4, cache=True)
    assert "cache: miss" in str(plan)
    assert not results.exists(), "planning writes nothing"
    plan.execute()
    again = quantdock.plan(tiny("llama"), quantize=NF4, cache=True)
    assert again.to_dict()["cache"]["state"] == "hit"
    assert again.to_dict()["groups"] == plan.to_dict()["groups"]
    shutil.rmtree(results)  # between the plan and its execution
    assert_same_model(again.execute(), quantdock.load(tiny("llama"), quantize=NF4))


def test_least_recently_used_entries_make_room(
    tiny: TinyFactory, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tiny("llama"), "made", quantize=NF4)
    (entry,) = Store(results).entries()
    held = load(tiny("llama"), "hit", quantize=NF4)
    monkeypatch.setenv("QUANTDOCK_CACHE_SIZE", str(entry.nbytes * 3 // 2))
    load(tiny("llama"), "made", quantize="bnb-fp4")
    assert entry.key not in {one.key for one in Store(results).entries()}
    assert_same_model(held, model)  # what it has mapped is still there
    monkeypatch.setenv("QUANTDOCK_CACHE_SIZE", "1000")
    refused = load(tiny("llama"), "unused", quantize=INT8)
    assert "QUANTDOCK_CACHE_SIZE allows 1,000" in quantdock.report(refused).cache["reason"]
    assert len(Store(results).entries()) == 1


# What goes wrong ------------------------------------------------------------------------------------------------------


def _truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def _foreign(file: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(3)}, file)


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        _truncate,
        _foreign,
        _flip,
        Path.unlink,
        lambda file: (file.parent / "manifest.json").write_text("{"),
        lambda file: (file.parent / "manifest.json").unlink(),
        lambda file: shutil.rmtree(file.parent),
    ],
    ids=["truncated", "foreign", "flipped", "gone", "manifest broken", "manifest gone", "all gone"],
)
def test_a_damaged_entry_is_made_anew(damage: Callable[[Path], None], tiny: TinyFactory, results: Path) -> None:
    first = load(tiny("llama"), "made", quantize=NF4)
    (entry,) = Store(results).entries()
    damage(entry.folder / "model.safetensors")
    assert_same_model(load(tiny("llama"), "made", quantize=NF4), first)
    assert_same_model(load(tiny("llama"), "hit", quantize=NF4), first)
    assert {path.name for path in results.iterdir()} == {entry.key}


def test_an_entry_of_another_load_under_this_name(tiny: TinyFactory, results: Path) -> None:
    """Even where stamps and digests agree, tensors that the plan doesn't expect aren't used."""
    load(tiny("llama"), "made", quantize=NF4)
    (entry,) = Store(results).entries()
    load(tiny("llama"), "made", quantize=INT8)
    (other,) = (one for one in Store(results).entries() if one.key != entry.key)
    shutil.rmtree(entry.folder)
    other.folder.rename(entry.folder)
    assert_same_model(load(tiny("llama"), "made", quantize=NF4), quantdock.load(tiny("llama"), quantize=NF4))


def test_a_folder_that_cannot_be_made(tiny: TinyFactory, results: Path, caplog: pytest.LogCaptureFixture) -> None:
    results.write_text("a file")
    model = load(tiny("llama"), "failed", quantize=NF4)
    assert_same_model(model, quantdock.load(tiny("llama"), quantize=NF4))
    assert "nothing was kept" in caplog.text
    assert quantdock.report(model).cache["reason"]


PRELUDE = """
import hashlib, json, os, resource, sys, time
import torch
import quantdock

source = sys.argv[1]
folder = os.environ["QUANTDOCK_CACHE_DIR"]
torch.set_num_threads(1)
quantdock.plan(source, quantize="bnb-nf4")  # imports what a load needs, once for all processes

def load(source):
    model = quantdock.load(source, quantize="bnb-nf4", cache=True, workers=1, progress=False)
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return quantdock.report(model).cache, digest.hexdigest()

def child(work):
    # No thread is running yet: a fork is a process like any other.
    pid = os.fork()
    if not pid:
        try:
            work()
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return pid

def said(work):
    read, write = os.pipe()
    pid = child(lambda: os.write(write, json.dumps(work()).encode()))
    os.close(write)
    with os.fdopen(read) as file:
        text = file.read()
    assert os.waitpid(pid, 0)[1] == 0
    return json.loads(text)
"""


def in_process(code: str, *arguments: str | Path) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_killed_at_any_moment(tiny: TinyFactory, results: Path) -> None:
    """Whatever a killed process left, the next load is right, and in the end one whole entry is there."""
    code = """
import random, shutil, signal
cache, expected = said(lambda: load(source))
assert cache["state"] == "made", cache
shutil.rmtree(folder)
started = time.perf_counter()
said(lambda: load(source))
whole = time.perf_counter() - started
draw = random.Random(3)
states, partial = [], 0
for number in range(12):
    if number % 2 or number % 3 == 0:
        shutil.rmtree(folder, ignore_errors=True)
    pid = child(lambda: load(source))
    # Some anywhere in the load, the others from the moment that the entry is being written.
    if number % 2:
        while not any(name.endswith(".partial") for name in (os.listdir(folder) if os.path.isdir(folder) else [])):
            if os.waitpid(pid, os.WNOHANG)[0]:
                pid = 0
                break
        time.sleep(0 if number % 4 == 1 else draw.uniform(0, 0.03))
    else:
        time.sleep(draw.uniform(0, whole))
    if pid:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    partial += any(name.endswith(".partial") for name in (os.listdir(folder) if os.path.isdir(folder) else []))
    cache, digest = said(lambda: load(source))
    assert digest == expected, (number, cache)
    assert cache["state"] in ("made", "hit"), cache
    states.append(cache["state"])
time.sleep(1.1)
for entry in os.listdir(folder):
    if not entry.startswith("."):
        shutil.rmtree(os.path.join(folder, entry))
said(lambda: load(source))
print(json.dumps({"states": states, "left": os.listdir(folder), "partial": partial}))
"""
    outcome = in_process(code, tiny("llama"))
    assert set(outcome["states"]) == {"made", "hit"}
    assert outcome["partial"], "no kill came in the middle of the writing"
    assert len(outcome["left"]) == 1, "what killed processes left is swept"


@pytest.mark.slow
def test_several_processes_at_once(tiny: TinyFactory, results: Path) -> None:
    code = """
import shutil
rounds = []
for _ in range(4):
    shutil.rmtree(folder, ignore_errors=True)
    begin = time.time() + 0.3
    def work():
        time.sleep(max(0, begin - time.time()))
        return load(source)
    pipes = []
    for _ in range(4):
        read, write = os.pipe()
        pid = child(lambda: os.write(write, json.dumps(work()).encode()))
        os.close(write)
        pipes.append((pid, read))
    found = []
    for pid, read in pipes:
        with os.fdopen(read) as file:
            found.append(json.loads(file.read()))
        assert os.waitpid(pid, 0)[1] == 0
    rounds.append({"found": found, "left": os.listdir(folder)})
print(json.dumps(rounds))
"""
    for outcome in in_process(code, tiny("llama")):
        assert len({digest for _, digest in outcome["found"]}) == 1
        assert {cache["state"] for cache, _ in outcome["found"]} <= {"made", "hit"}
        assert len(outcome["left"]) == 1


def test_a_limit_on_the_size_of_files(tiny: TinyFactory, results: Path) -> None:
    """The kernel refuses to write on in the middle of a file, as it does on a full disk."""
    code = """
states = []
for limit in (0, 1, 1000, 20_000, 10_000_000):
    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return load(source)
    states.append([said(work), os.listdir(folder)])
print(json.dumps(states))
"""
    outcome = in_process(code, tiny("llama"))
    assert len({digest for (_, digest), _ in outcome}) == 1
    for (cache, _), left in outcome[:-1]:
        assert cache["state"] == "failed"
        assert "File too large" in cache["reason"]
        assert left == []
    assert outcome[-1][0][0]["state"] == "made"


def test_a_full_disk(tiny: TinyFactory, tmp_path: Path) -> None:
    mount = tmp_path / "results" / "disk"
    mount.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mount)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small disk takes privileges that this process doesn't have")
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("QUANTDOCK_CACHE_DIR", str(mount / "results"))
            model = load(tiny("llama"), "failed", quantize=NF4)
            assert "No space left on device" in quantdock.report(model).cache["reason"]
            assert list((mount / "results").iterdir()) == []
            assert_same_model(model, quantdock.load(tiny("llama"), quantize=NF4))
            with pytest.raises(quantdock.SaveError, match="No space left on device"):
                quantdock.save(model, mount / "saved")
    finally:
        subprocess.run(["umount", str(mount)], check=True)
