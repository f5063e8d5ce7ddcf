"""The command line with real architectures: plan, load and save, and talking to a model as transformers would."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import TinyFactory
from typer.testing import CliRunner

import quantdock
from quantdock.cli.app import app

TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}<assistant>"
DEMO_MODEL = Path(__file__).parent.parent / ".cache" / "SmolLM2-135M-Instruct.Q4_1.gguf"


def run(*arguments: str, stdin: str | None = None) -> str:
    """Stdout of a command that has to succeed, in a process of its own."""
    command = [sys.executable, "-W", "error", "-c", "from quantdock.cli import main; main()", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, input=stdin)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def run_here(*arguments: str, stdin: str | None = None) -> str:
    """The same in this process, where transformers is imported already."""
    result = CliRunner().invoke(app, list(arguments), input=stdin, catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    return result.stdout


@pytest.fixture
def speaker(tiny_copy: TinyFactory) -> Path:
    """A tiny Llama with a tokenizer of a word a token, and a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>", "<system>", "hello"]
    vocabulary = {word: index for index, word in enumerate([*words, *(f"w{n}" for n in range(120))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = tiny_copy("llama")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", chat_template=TEMPLATE
    ).save_pretrained(folder)
    return folder


def expected(folder: Path, text: str, length: int) -> tuple[str, int]:
    """What transformers generates after ``text``, and how many tokens that is."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=length)[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(output, skip_special_tokens=True), len(output)


@pytest.mark.slow
def test_plan_load_and_save_from_a_shell(speaker: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    plan = json.loads(run("plan", str(speaker), "--json"))
    target = tmp_path / "saved"
    arguments = ["--json", "--prompt", "hello", "--max-new-tokens", "5", "--save", str(target)]
    loaded = json.loads(run("load", str(speaker), *arguments))
    assert plan["resident_nbytes"] == loaded["predicted_nbytes"] == loaded["measured_nbytes"]
    assert loaded["sample"]["text"] == expected(speaker, "hello", 5)[0]
    assert loaded["saved"] == str(target)
    saved = AutoModelForCausalLM.from_pretrained(target).state_dict()
    for name, tensor in AutoModelForCausalLM.from_pretrained(speaker).state_dict().items():
        assert torch.equal(saved[name], tensor), name


def test_tables(tiny: TinyFactory) -> None:
    folder = str(tiny("llama"))
    plan = run_here("plan", folder, "--dtype", "float32")
    assert "model.layers.*.mlp.up_proj.weight x2" in plan
    assert "quantdock-transformers" in plan
    report = run_here("load", folder, "--quiet")
    assert "LlamaForCausalLM from" in report
    assert "there is no sample: the model generates no text, or the source has no tokenizer" in report


def test_chat_says_what_transformers_says(speaker: Path) -> None:
    data = json.loads(run_here("chat", str(speaker), "--prompt", "hello w7", "--max-new-tokens", "9", "--json"))
    answer, tokens = expected(speaker, "<user> hello w7 <assistant>", 9)
    assert (data["answer"], data["tokens"]) == (answer, tokens)
    streamed = run_here("chat", str(speaker), "--prompt", "hello w7", "--max-new-tokens", "9")
    assert streamed == f"{answer}\n"


def test_chat_in_turns(speaker: Path) -> None:
    arguments = ["--system", "w1", "--max-new-tokens", "4"]
    first, second = run_here("chat", str(speaker), *arguments, stdin="hello\nw9\n").splitlines()
    assert first == expected(speaker, "<system> w1 <user> hello <assistant>", 4)[0]
    turns = f"<system> w1 <user> hello <assistant> {first} <user> w9 <assistant>"
    assert second == expected(speaker, turns, 4)[0]


def chatter_of(folder: Path) -> tuple[torch.nn.Module, Any]:
    plan = quantdock.plan(folder)
    model = plan.execute()
    return model, plan.skeleton.architecture.chatter(plan.source)


def test_chat_with_temperature_samples(speaker: Path) -> None:
    _, chatter = chatter_of(speaker)
    torch.manual_seed(1)
    messages = [{"role": "user", "content": "hello"}]
    answers = {"".join(chatter.stream(messages, max_new_tokens=8, temperature=5.0)) for _ in range(4)}
    assert len(answers) > 1


def test_who_stops_listening_stops_the_model(speaker: Path) -> None:
    _, chatter = chatter_of(speaker)
    before = threading.active_count()
    pieces = chatter.stream([{"role": "user", "content": "hello"}], max_new_tokens=100_000, temperature=1.0)
    next(pieces)
    started = time.perf_counter()
    pieces.close()
    assert time.perf_counter() - started < 30
    assert threading.active_count() == before


def test_an_error_while_generating_is_raised(speaker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, chatter = chatter_of(speaker)

    def fail(**_: Any) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        list(chatter.stream([{"role": "user", "content": "hello"}], max_new_tokens=5, temperature=0.0))


def test_no_chat_without_a_template(speaker: Path) -> None:
    (speaker / "chat_template.jinja").unlink()
    result = CliRunner().invoke(app, ["chat", str(speaker), "--prompt", "hello"])
    assert result.exit_code == 1
    assert "the tokenizer has no chat template" in result.stderr


def test_a_template_that_refuses(speaker: Path) -> None:
    (speaker / "chat_template.jinja").write_text("{{ raise_exception('no system role') }}")
    result = CliRunner().invoke(app, ["chat", str(speaker), "--prompt", "hello", "--system", "w1"])
    assert result.exit_code == 1
    assert "no system role" in result.stderr


@pytest.mark.parametrize("content", ["{", '{"version": "1.0", "added_tokens": [], "model": {"type": "unknown"}}'])
def test_a_broken_tokenizer_is_named(content: str, speaker: Path) -> None:
    (speaker / "tokenizer.json").write_text(content)
    result = CliRunner().invoke(app, ["chat", str(speaker), "--prompt", "hello"])
    assert result.exit_code == 1
    assert "its tokenizer can't be loaded" in result.stderr


def test_a_model_that_generates_nothing_has_no_chat(speaker: Path) -> None:
    result = CliRunner().invoke(
        app, ["chat", str(speaker), "--prompt", "hello", "--task", "base", "--ignore-unexpected", "lm_head"]
    )
    assert result.exit_code == 1
    assert "the architecture offers no chat" in result.stderr


@pytest.mark.demo
@pytest.mark.slow
@pytest.mark.skipif(not DEMO_MODEL.is_file(), reason="`make demo` fetches the model")
def test_chat_with_a_gguf_file() -> None:
    question = "What is the capital of France?"
    data = json.loads(run_here("chat", str(DEMO_MODEL), "--prompt", question, "--max-new-tokens", "16", "--json"))
    assert "Paris" in data["answer"]
    assert 0 < data["tokens"] <= 16
