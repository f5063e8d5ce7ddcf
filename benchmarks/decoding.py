"""The process of one measured generation: takes a ``DecodeJob`` as JSON and answers with a ``DecodeOutcome``."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

from benchmarks.contenders import LLAMA_CPP, QUANTDOCK, loader
from benchmarks.jobs import DecodeJob, DecodeOutcome, Job
from benchmarks.machine import versions

_WARM_UP = 2
"""Tokens that are generated first: a library may rearrange weights when they are first used."""
_STRIDE = 7919
"""Between the tokens of the prompt, which stands for any text."""
_LOGITS = 1024
"""Of those after the prompt, so many are told."""


class Generator(Protocol):
    """A loaded model, told only what to read."""

    vocabulary: int
    threads: int
    logits: list[float]
    """After the prompt; empty if it can't tell."""

    def restart(self, prompt: list[int]) -> int:
        """Forget everything, read the prompt; the likeliest token after it."""

    def follow(self, token: int) -> int:
        """Read one more token; the likeliest after it."""


class TorchGenerator:
    """A causal language model of transformers' classes, whoever loaded it."""

    def __init__(self, job: DecodeJob) -> None:
        import torch

        self._model = _load(job).eval()
        self._past: Any = None
        self.logits: list[float] = []
        self.vocabulary = int(self._model.config.vocab_size)
        self.threads = torch.get_num_threads()

    def restart(self, prompt: list[int]) -> int:
        self._past = None
        logits = self._read(prompt)
        self.logits = logits[:_LOGITS].tolist()
        return int(logits.argmax())

    def follow(self, token: int) -> int:
        return int(self._read([token]).argmax())

    def _read(self, tokens: list[int]) -> Any:
        import torch

        with torch.inference_mode():
            read = torch.tensor([tokens])
            made = self._model(read, past_key_values=self._past, use_cache=True, logits_to_keep=1)
        self._past = made.past_key_values
        return made.logits[0, -1]


def _load(job: DecodeJob) -> Any:
    if job.dtype is None:
        return loader(job.load)(job.load.folder)
    if job.load.contender == QUANTDOCK:
        import quantdock

        return quantdock.load(job.load.folder, dtype=job.dtype, device_map="cpu", progress=False)
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(job.load.folder, dtype=job.dtype, device_map="cpu")


class LlamaGenerator:
    """llama.cpp on a GGUF file, through llama-cpp-python."""

    def __init__(self, job: DecodeJob) -> None:
        from os import environ, sched_getaffinity

        from llama_cpp import Llama

        self.logits: list[float] = []
        self.threads = int(environ.get("OMP_NUM_THREADS") or len(sched_getaffinity(0)))
        self._model = Llama(
            job.load.folder,
            n_ctx=0,
            n_threads=self.threads,
            n_threads_batch=self.threads,
            logits_all=False,
            verbose=False,
        )
        self.vocabulary = int(self._model.n_vocab())

    def restart(self, prompt: list[int]) -> int:
        self._model.reset()
        return self._read(prompt)

    def follow(self, token: int) -> int:
        return self._read([token])

    def _read(self, tokens: list[int]) -> int:
        self._model.eval(tokens)
        return int(self._model.sample(temp=0.0, repeat_penalty=1.0))


GENERATORS: dict[str, Callable[[DecodeJob], Generator]] = {LLAMA_CPP: LlamaGenerator}
"""Contender -> what generates; by default a ``TorchGenerator``."""


def measure(job: DecodeJob) -> DecodeOutcome:
    """Load, warm up, generate as often as asked."""
    generator = GENERATORS.get(job.load.contender, TorchGenerator)(job)
    prompt = [index * _STRIDE % generator.vocabulary for index in range(1, job.prompt + 1)]
    _generate(generator, prompt, _WARM_UP)
    runs = [_generate(generator, prompt, job.tokens) for _ in range(job.repeats)]
    return DecodeOutcome(
        prefill_seconds=[prefill for prefill, _, _ in runs],
        decode_seconds=[decode for _, decode, _ in runs],
        tokens=runs[0][2],
        logits=generator.logits,
        versions=versions(),
        threads=generator.threads,
    )


def _generate(generator: Generator, prompt: list[int], count: int) -> tuple[float, float, list[int]]:
    """Seconds for the prompt, seconds for the tokens after the first, and the tokens."""
    start = time.perf_counter()
    tokens = [generator.restart(prompt)]
    read = time.perf_counter()
    while len(tokens) < count:
        tokens.append(generator.follow(tokens[-1]))
    return read - start, time.perf_counter() - read, tokens


if __name__ == "__main__":
    answer, sys.stdout = sys.stdout, sys.stderr  # what a library prints isn't the answer
    question = json.load(sys.stdin)
    outcome = measure(DecodeJob(**question | {"load": Job(**question["load"])}))
    print(json.dumps(dataclasses.asdict(outcome)), file=answer, flush=True)
