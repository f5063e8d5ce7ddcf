"""The command line, with modules and plugins made here: no model library is needed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import save_file
from typer.testing import CliRunner

from quantdock import __version__, calls
from quantdock.architecture import Architecture
from quantdock.cli.app import app
from quantdock.cli.arguments import (
    LoadArguments,
    SourceArguments,
    device_map_of,
    max_memory_of,
    overrides_of,
    quantize_of,
)
from quantdock.errors import UnsupportedError
from quantdock.inspecting import inspect

CONFIG = {"model_type": "tiny", "dtype": "float32", "architectures": ["Tiny"]}


class Tiny(torch.nn.Module):
    """Two blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(8, 8, bias=False) for _ in range(2))
        self.head = torch.nn.Linear(8, 4)


class Run:
    """What a command left behind."""

    def __init__(self, *arguments: str, stdin: str | None = None) -> None:
        result = CliRunner().invoke(app, list(arguments), input=stdin)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        self.code, self.out, self.err = result.exit_code, result.stdout, result.stderr

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QUANTDOCK_POLICY", raising=False)
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The checkpoint of a ``Tiny``."""
    torch.manual_seed(0)
    save_file(Tiny().state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


# Outside of the commands ----------------------------------------------------------------------------------------------


def test_version() -> None:
    run = Run("--version")
    assert (run.code, run.out) == (0, f"quantdock {__version__}\n")


@pytest.mark.parametrize("name", ["plan", "load", "chat", "inspect", "plugins"])
def test_help(name: str) -> None:
    run = Run(name, "--help")
    assert run.code == 0
    assert "--json" in run.out
    assert name in Run("--help").out


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan"],
        ["plan", ".", "--no-such-option"],
        ["plan", ".", "--workers", "0"],
        ["plan", ".", "--max-memory", "20GiB"],
        ["plan", ".", "--config-override", "rope=linear"],
        ["load", ".", "--no-sample", "--prompt", "x"],
        ["chat", ".", "--json"],
        ["no-such-command"],
    ],
)
def test_wrong_usage_is_2(arguments: list[str]) -> None:
    run = Run(*arguments)
    assert run.code == 2
    assert run.out == ""
    assert "Usage: " in run.err


@pytest.mark.parametrize("name", ["plan", "load", "chat", "inspect"])
def test_an_error_is_a_message_on_stderr(name: str) -> None:
    run = Run(name, "/no/such/folder")
    assert (run.code, run.out) == (1, "")
    assert run.err.startswith("error: /no/such/folder doesn't exist.")
    assert "Traceback" not in run.err


def test_an_error_as_json() -> None:
    run = Run("plan", "/no/such/folder", "--json")
    assert run.code == 1
    assert run.err == ""
    assert run.json["error"]["type"] == "SourceError"
    assert run.json["error"]["message"].startswith("/no/such/folder doesn't exist.")


def test_debug_shows_the_traceback() -> None:
    run = Run("inspect", "/no/such/folder", "--debug")
    assert run.code == 1
    assert "Traceback (most recent call last)" in run.err
    assert "error: /no/such/folder" in run.err


@pytest.mark.parametrize(
    "arguments", [["plugins"], ["plugins", "--json"], ["--help"], ["plan", "--help"], ["--version"]]
)
def test_listings_import_neither_torch_nor_a_plugin(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from quantdock.cli.app import app\n"
        f"app({arguments!r}, standalone_mode=False)\n"
        "found = {name.partition('.')[0] for name in sys.modules}\n"
        "print(sorted(name for name in found if name == 'torch' or name.startswith('quantdock_')), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_listings_are_fast() -> None:
    """0.2 s of processor time where this was written; torch alone would be more than a second."""
    code = (
        "import resource, sys\n"
        "from quantdock.cli.app import app\n"
        "app(['plugins'], standalone_mode=False)\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(used.ru_utime + used.ru_stime, file=sys.stderr)\n"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(3)]
    assert min(float(run.stderr) for run in runs) < 0.6


# The options ----------------------------------------------------------------------------------------------------------


def test_options_are_arguments_of_load_and_inspect() -> None:
    import inspect as introspection

    assert LoadArguments().options().keys() <= introspection.signature(calls.load).parameters.keys()
    assert SourceArguments().options().keys() <= introspection.signature(inspect).parameters.keys()


def test_options_left_out_are_the_defaults_of_load() -> None:
    import inspect as introspection

    parameters = introspection.signature(calls.load).parameters
    assert LoadArguments().options() == {name: parameters[name].default for name in LoadArguments().options()}


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ([], None),
        (["bnb-nf4"], "bnb-nf4"),
        (["none"], None),
        (['{"quant_method": "x", "group_size": 8}'], {"quant_method": "x", "group_size": 8}),
        (["*.mlp.*=a", "head=none"], {"*.mlp.*": "a", "head": None}),
        (["a", "head=b"], {"head": "b", "*": "a"}),
        (['head={"quant_method": "x"}'], {"head": {"quant_method": "x"}}),
    ],
)
def test_quantize(given: list[str], meant: Any) -> None:
    found = quantize_of(given)
    assert found == meant
    if isinstance(meant, dict):
        assert list(found) == list(meant)  # the first pattern that matches decides, so the order counts


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["a", "b"], "more than one preset has no pattern"),
        (["x=a", "x=b"], "'x' is given twice"),
        (["=a"], "expected PATTERN=PRESET"),
        (["x="], "expected PATTERN=PRESET"),
        (["{x"], "isn't JSON"),
    ],
)
def test_quantize_that_makes_no_sense(given: list[str], message: str) -> None:
    with pytest.raises(typer.BadParameter, match=message):
        quantize_of(given)


def test_device_map_and_max_memory() -> None:
    assert [device_map_of(text) for text in (None, "auto", "0", '{"a": 0}')] == [None, "auto", 0, {"a": 0}]
    assert max_memory_of(["0=20GiB", "cpu=1GB"]) == {0: "20GiB", "cpu": "1GB"}
    assert max_memory_of([]) is None


def test_config_overrides() -> None:
    assert overrides_of([]) is None
    assert overrides_of(["a.b=1", "a.c=[2]", 'd="x"']) == {"a": {"b": 1, "c": [2]}, "d": "x"}
    with pytest.raises(typer.BadParameter, match="a string needs quotes"):
        overrides_of(["d=x"])
    with pytest.raises(typer.BadParameter, match=r"'a\.b' leads into a value that is no object"):
        overrides_of(["a=1", "a.b=2"])
    with pytest.raises(typer.BadParameter, match="'a' is given twice"):
        overrides_of(["a.b=2", "a=1"])


# plugins --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Makes distributions that are installed but can't be imported."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(dist: str, entry_points: str) -> None:
        info = tmp_path / f"{dist.replace('-', '_')}-1.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.5\n")
        (info / "entry_points.txt").write_text(entry_points)

    return install


def test_plugins(site: Callable[[str, str], None]) -> None:
    site(
        "dock-one", "[quantdock.quantizers]\nmethod-one = no_such_module:X\n[quantdock.presets]\none-int4 = no_such:Y\n"
    )
    listed = {(one["kind"], one["name"]): one for one in Run("plugins", "--json").json["plugins"]}
    assert listed["quantizer", "method-one"] == {
        "kind": "quantizer",
        "name": "method-one",
        "distribution": "dock-one",
        "version": "1.5",
        "allowed": True,
        "reason": "no policy",
        "claimed_by": [],
        "value": "no_such_module:X",
    }
    assert ("preset", "one-int4") in listed
    run = Run("plugins")
    assert run.code == 0
    assert "method-one" in run.out


def test_plugins_that_a_policy_refuses(
    site: Callable[[str, str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site("dock-one", "[quantdock.quantizers]\nmethod = no_such_module:X\n")
    site("dock-two", "[quantdock.quantizers]\nmethod = no_such_module:X\n")
    policy = tmp_path / "policy.toml"
    policy.write_text('[plugins]\ndefault = "deny"\nallow = ["dock-one>=1"]\n')
    monkeypatch.setenv("QUANTDOCK_POLICY", str(policy))
    data = Run("plugins", "--json").json
    listed = {one["distribution"]: one for one in data["plugins"]}
    assert data["policy"] == str(policy)
    assert listed["dock-one"]["allowed"]
    assert not listed["dock-two"]["allowed"]
    assert "default = 'deny'" in listed["dock-two"]["reason"]
    assert listed["dock-two"]["claimed_by"] == ["dock-one"]
    assert "claimed by dock-one too" in Run("plugins").out


def test_a_broken_policy_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTDOCK_POLICY", str(tmp_path / "missing.toml"))
    run = Run("plugins")
    assert run.code == 1
    assert "missing.toml: can't be read" in run.err


# inspect --------------------------------------------------------------------------------------------------------------


def test_inspect(folder: Path) -> None:
    run = Run("inspect", str(folder))
    assert run.code == 0
    assert "tiny" in run.out
    assert "blocks.*.weight x2" in run.out
    assert "blocks.0.weight" not in run.out
    every = Run("inspect", str(folder), "--tensors").out
    assert "blocks.0.weight" in every
    assert "blocks.1.weight" in every


def test_inspect_as_json(folder: Path) -> None:
    data = Run("inspect", str(folder), "--json", "--tensors").json
    assert (data["model_type"], data["dtype"], data["quantization"]) == ("tiny", "float32", None)
    assert (data["format"], data["count"], data["metadata"]) == ("safetensors", 4, {"format": "pt"})
    assert data["nbytes"] == 4 * (2 * 64 + 32 + 4)
    assert data["totals"] == [{"dtype": "float32", "count": 4, "values": 164, "nbytes": 656}]
    assert {one["name"]: one["shape"] for one in data["tensors"]}["head.weight"] == [4, 8]
    size = (folder / "model.safetensors").stat().st_size
    assert data["files"] == [{"file": str(folder / "model.safetensors"), "nbytes": size}]
    grouped = Run("inspect", str(folder), "--json").json
    assert "tensors" not in grouped
    assert {one["name"]: one["count"] for one in grouped["groups"]}["blocks.*.weight"] == 2


def test_inspect_tells_of_quantization(folder: Path) -> None:
    (folder / "config.json").write_text(
        json.dumps(CONFIG | {"quantization_config": {"quant_method": "unknown", "bits": 4}})
    )
    assert Run("inspect", str(folder), "--json").json["quantization"] == {"quant_method": "unknown", "bits": 4}
    assert "quant_method='unknown', bits=4" in Run("inspect", str(folder)).out


def test_inspect_a_file_without_a_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    data = Run("inspect", str(folder / "model.safetensors"), "--json").json
    assert (data["model_type"], data["count"]) == (None, 4)


def test_inspect_a_broken_file(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 16)
    run = Run("inspect", str(folder), "--json")
    assert run.code == 1
    assert run.json["error"]["type"] == "CheckpointError"


def test_names_can_not_reach_the_terminal(folder: Path) -> None:
    save_file({"evil\x1b[2J": torch.zeros(1)}, folder / "model.safetensors")
    run = Run("inspect", str(folder))
    assert "\x1b" not in run.out
    assert "evil\\x1b[2J" in run.out


# plan and load, with a module of our own in place of an architecture plugin -------------------------------------------


@pytest.fixture
def own_module(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every load builds a ``Tiny``."""
    plan = calls.plan
    monkeypatch.setattr(calls, "plan", lambda source, **options: plan(source, model=Tiny, **options))
    return folder


def test_plan(own_module: Path) -> None:
    run = Run("plan", str(own_module))
    assert run.code == 0
    assert "blocks.*.weight x2" in run.out
    assert "656 bytes, predicted" in run.out
    data = Run("plan", str(own_module), "--json").json
    assert data["resident_nbytes"] == 656
    assert data["coverage"] == {"": 656}


def test_options_reach_the_plan(own_module: Path) -> None:
    data = Run("plan", str(own_module), "--json", "--dtype", "bfloat16", "--memory-budget", "1MiB").json
    assert (data["dtype"], data["resident_nbytes"], data["memory_budget"]) == ("bfloat16", 328, 1 << 20)
    run = Run("plan", str(own_module), "--quantize", "no-such-preset")
    assert run.code == 1
    assert "no installed plugin offers the preset 'no-such-preset'" in run.err
    run = Run("plan", str(own_module), "--allow-missing", "nothing.*")
    assert run.code == 1
    assert "allow_missing: 'nothing.*'" in run.err


def test_plan_shows_what_was_let_through(own_module: Path) -> None:
    tensors = Tiny().state_dict() | {"extra.0.x": torch.zeros(1), "extra.1.x": torch.zeros(1)}
    save_file(tensors, own_module / "model.safetensors")
    assert "LedgerError" in Run("plan", str(own_module), "--json").out
    run = Run("plan", str(own_module), "--ignore-unexpected", "extra.*")
    assert run.code == 0
    assert "extra.*.x x2" in run.out


def test_load(own_module: Path) -> None:
    run = Run("load", str(own_module))
    assert run.code == 0
    assert "656 bytes" in run.out
    assert "there is no sample: " in run.out
    data = Run("load", str(own_module), "--json", "--no-sample", "--quiet").json
    assert data["predicted_nbytes"] == data["measured_nbytes"] == 656
    assert data["sample"] is None


def test_a_prompt_needs_an_answer(own_module: Path) -> None:
    run = Run("load", str(own_module), "--prompt", "x")
    assert run.code == 1
    assert "there is no sample: " in run.err


def test_load_and_save(own_module: Path, tmp_path: Path) -> None:
    target = tmp_path / "saved"
    data = Run("load", str(own_module), "--json", "--no-sample", "--dtype", "bfloat16", "--save", str(target)).json
    assert data["saved"] == str(target)
    assert Run("inspect", str(target), "--json").json["nbytes"] == 328


# chat -----------------------------------------------------------------------------------------------------------------


class Parrot:
    """Says the last message again, a token a word; after ``stop`` comes Ctrl-C."""

    def __init__(self) -> None:
        self.heard: list[list[Mapping[str, str]]] = []
        self.limits: dict[str, float] = {}

    def stream(
        self, messages: Sequence[Mapping[str, str]], *, max_new_tokens: int, temperature: float
    ) -> Iterator[str]:
        self.heard.append([dict(message) for message in messages])
        self.limits = {"max_new_tokens": max_new_tokens, "temperature": temperature}
        if messages[-1]["content"] == "refuse":
            raise UnsupportedError("no chat template")
        return self._words(messages[-1]["content"])

    def _words(self, text: str) -> Iterator[str]:
        for word in text.split():
            yield f"{word} "
            if word == "stop":
                raise KeyboardInterrupt

    def complete(self, prompt: str, *, max_new_tokens: int) -> str:
        return f" and {max_new_tokens} more"


@pytest.fixture
def parrot(own_module: Path, monkeypatch: pytest.MonkeyPatch) -> Parrot:
    made = Parrot()
    monkeypatch.setattr(Architecture, "chatter", lambda self, source: made)
    return made


def test_chat_answers_once(own_module: Path, parrot: Parrot) -> None:
    run = Run("chat", str(own_module), "--prompt", "hello you", "--system", "be kind", "--temperature", "0.5")
    assert (run.code, run.out) == (0, "hello you \n")
    assert parrot.heard == [[{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello you"}]]
    assert parrot.limits == {"max_new_tokens": 512, "temperature": 0.5}


def test_chat_as_json(own_module: Path, parrot: Parrot) -> None:
    data = Run("chat", str(own_module), "--prompt", "hello you", "--json").json
    assert data.pop("seconds") >= 0
    assert data == {"prompt": "hello you", "answer": "hello you ", "tokens": 2}


def test_chat_remembers_and_ends_with_the_input(own_module: Path, parrot: Parrot) -> None:
    run = Run("chat", str(own_module), stdin="one\n\ntwo\n")
    assert (run.code, run.out) == (0, "one \ntwo \n")
    roles = [message["role"] for message in parrot.heard[1]]
    assert roles == ["user", "assistant", "user"]
    assert parrot.heard[1][1]["content"] == "one "


def test_an_interrupted_answer_does_not_end_the_chat(own_module: Path, parrot: Parrot) -> None:
    run = Run("chat", str(own_module), stdin="please stop now\ngo on\n")
    assert (run.code, run.out) == (0, "please stop  ...\ngo on \n")
    assert parrot.heard[1][1] == {"role": "assistant", "content": "please stop "}


def test_chat_shows_no_control_characters(own_module: Path, parrot: Parrot) -> None:
    assert Run("chat", str(own_module), "--prompt", "\x1b[2J").out == "\\x1b[2J \n"


def test_chat_that_is_refused(own_module: Path, parrot: Parrot) -> None:
    run = Run("chat", str(own_module), "--prompt", "refuse", "--json")
    assert run.code == 1
    assert run.json["error"] == {"type": "UnsupportedError", "message": "no chat template"}


def test_no_chat_without_a_chatter(own_module: Path) -> None:
    run = Run("chat", str(own_module), "--prompt", "x")
    assert run.code == 1
    assert "the architecture offers no chat" in run.err


def test_load_shows_a_sample(own_module: Path, parrot: Parrot) -> None:
    run = Run("load", str(own_module), "--max-new-tokens", "7")
    assert "The capital of France is and 7 more" in run.out
    data = Run("load", str(own_module), "--json", "--prompt", "One").json
    assert (data["sample"]["prompt"], data["sample"]["text"]) == ("One", " and 32 more")
