"""How close quantized models stay to the original: perplexity on a text that no calibration has seen.

The model is loaded in bfloat16, and with each method in 4 bits: rounded to nearest, symmetric and with zero points,
calibrated with GPTQ and with AWQ, and by gptqmodel where it is installed. All calibrate on the same token ids. `gap` is
how far a perplexity is from the original's; `of RTN` compares that with symmetric rounding's. Quantized models are
dequantized for measuring, so that no kernel has a part in it.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import quality_texts
from benchmarks.machine import Machine, versions
from benchmarks.options import positive, write_json
from benchmarks.tables import table

_HEADER = ("case", "by", "perplexity", "gap", "of RTN", "seconds")
_AIM = 0.5
"""Of rounding's gap: what a calibrated method may leave."""
_JUDGED = ("GPTQ act order", "AWQ")
_TOGETHER = 4  # samples in one forward


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One case."""

    case: str
    by: str
    perplexity: float
    seconds: float
    """To load, quantized."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """Token ids of both texts."""

    calibration: list[list[int]]
    evaluation: list[list[int]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``quality``."""
    parser.add_argument("--model", type=Path, help="a folder or GGUF file (default: the demo's SmolLM2-135M, fetched)")
    parser.add_argument(
        "--calibration", type=Path, metavar="TEXT", help=f"default: {quality_texts.reference.__doc__}".rstrip(".")
    )
    parser.add_argument(
        "--evaluation", type=Path, metavar="TEXT", help=f"default: {quality_texts.docstrings.__doc__}".rstrip(".")
    )
    parser.add_argument("--samples", type=positive, default=128, help="to calibrate with (default: %(default)s)")
    parser.add_argument("--length", type=positive, default=512, help="tokens of each sample (default: %(default)s)")
    parser.add_argument("--evaluated", type=positive, default=40, help="samples to measure (default: %(default)s)")
    parser.add_argument("--group-size", type=positive, default=64, help="inputs per scale (default: %(default)s)")
    parser.add_argument("--cases", nargs="+", help="only these, beside bf16 and RTN")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured there, too")


def run(options: argparse.Namespace) -> int:
    """Measure, print the table; 1 if a calibrated method leaves more than half of rounding's gap, or more than
    gptqmodel does."""
    model = quality_texts.model(options.model)
    data = _data(model, options)
    outcomes: list[Outcome] = []
    skipped: dict[str, str] = {}
    for name, by, load in _cases(model, data, options):
        if options.cases and name not in (*options.cases, "bf16", "RTN"):
            continue
        try:
            started = time.perf_counter()
            loaded = load()
            seconds = time.perf_counter() - started
        except ImportError as error:
            skipped[name] = str(error)
            continue
        outcomes.append(Outcome(case=name, by=by, perplexity=perplexity(loaded, data.evaluation), seconds=seconds))
        print(_line(outcomes[-1]), file=sys.stderr, flush=True)
        del loaded
    _print(outcomes, skipped, data, options)
    write_json(options, {"outcomes": [asdict(outcome) for outcome in outcomes], "skipped": skipped})
    return 0 if all(_verdicts(outcomes).values()) else 1


def perplexity(model: Any, samples: list[list[int]]) -> float:
    """Of the tokens of each sample but its first, given those before."""
    import torch

    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(samples), _TOGETHER):
            ids = torch.tensor(samples[start : start + _TOGETHER])
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
            total += float(losses)
            count += ids[:, 1:].numel()
    return float(torch.tensor(total / count).exp())


def _data(model: Path, options: argparse.Namespace) -> Data:
    tokenizer = quality_texts.tokenizer(model)
    calibration = quality_texts.text(options.calibration, quality_texts.reference)
    evaluation = quality_texts.text(options.evaluation, quality_texts.docstrings)
    return Data(
        calibration=quality_texts.samples(tokenizer, calibration, options.samples, options.length),
        evaluation=quality_texts.samples(tokenizer, evaluation, options.evaluated, options.length),
    )


def _cases(model: Path, data: Data, options: argparse.Namespace) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """Name of a case, who does it, and what loads its model."""
    size, samples = options.group_size, data.calibration
    shared = {"quant_method": "gptq", "bits": 4, "group_size": size}
    calibrated = shared | {"dataset": samples, "batch_size": 8}
    configs: dict[str, Any] = {
        "bf16": None,
        "RTN": shared,
        "RTN, zero points": shared | {"sym": False},
        "GPTQ": calibrated,
        "GPTQ act order": calibrated | {"desc_act": True},
        "AWQ": {"quant_method": "awq", "bits": 4, "group_size": size, "dataset": samples},
    }
    for name, config in configs.items():
        yield name, "quantdock", partial(_quantdock, model, config)
    theirs: dict[str, dict[str, Any]] = {
        "GPTQ": {"act_group_aware": True},
        "GPTQ act order": {"desc_act": True, "act_group_aware": False},
        "AWQ": {"method": "awq", "format": "gemm", "sym": False},
    }
    for name, fields in theirs.items():
        yield f"{name} by gptqmodel", "gptqmodel", partial(_gptqmodel, model, samples, size, fields)


def _quantdock(model: Path, config: Any) -> Any:
    import quantdock

    if config is not None and config["quant_method"] not in quantdock.quantizers():
        raise ImportError(f"quantdock-{config['quant_method']} isn't installed")
    loaded = quantdock.load(model, quantize=config, dtype="bfloat16")
    return loaded if config is None else quantdock.dequantize(loaded)


def _gptqmodel(model: Path, samples: list[list[int]], size: int, fields: dict[str, Any]) -> Any:
    """Quantize with gptqmodel, and read its checkpoint."""
    import torch
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    import quantdock

    # Left to choose, it packs AWQ with a kernel of CUDA's, and refuses to start where there is none.
    portable = fields.get("method") == "awq" and not torch.cuda.is_available()
    options = {"batch_size": 8} | ({"backend": BACKEND.AWQ_TORCH} if portable else {})
    model = model.resolve()
    with tempfile.TemporaryDirectory() as work, contextlib.chdir(work):  # where it leaves its logs
        folder = Path(work, "model")
        quantdock.save(quantdock.load(model, dtype="bfloat16"), folder)
        quality_texts.tokenizer(model).save_pretrained(folder)
        config = QuantizeConfig(bits=4, group_size=size, **fields)
        found = GPTQModel.load(str(folder), config)
        found.quantize([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in samples], **options)
        found.save(str(Path(work, "quantized")))
        loaded = quantdock.load(Path(work, "quantized"), dtype="bfloat16")
        return quantdock.dequantize(loaded)


def _print(outcomes: list[Outcome], skipped: dict[str, str], data: Data, options: argparse.Namespace) -> None:
    print(Machine.here().header(versions()))
    tokens = [sum(map(len, samples)) for samples in (data.calibration, data.evaluation)]
    texts = [
        options.calibration or quality_texts.reference.__doc__,
        options.evaluation or quality_texts.docstrings.__doc__,
    ]
    print(f"calibrate {tokens[0]} tokens of {texts[0]}")
    print(f"evaluate  {tokens[1]} tokens of {texts[1]}\n")
    gaps = _gaps(outcomes)
    rows = [
        (
            *(one.case, one.by, f"{one.perplexity:.3f}", f"{gaps[one.case]:.3f}"),
            *(f"{gaps[one.case] / gaps['RTN']:.2f}", f"{one.seconds:.1f}"),
        )
        for one in outcomes
    ]
    print(table(_HEADER, rows))
    for name, reason in skipped.items():
        print(f"left out: {name}: {reason}")
    for name, holds in _verdicts(outcomes).items():
        print(f"{name} leaves at most {_AIM:g} of RTN's gap, and no more than gptqmodel where that was run: {holds}")


def _gaps(outcomes: list[Outcome]) -> dict[str, float]:
    original = outcomes[0].perplexity
    return {one.case: one.perplexity - original for one in outcomes}


def _verdicts(outcomes: list[Outcome]) -> dict[str, bool]:
    gaps = _gaps(outcomes)
    return {
        name: gaps[name] <= min(_AIM * gaps["RTN"], gaps.get(f"{name} by gptqmodel", float("inf")))
        for name in _JUDGED
        if name in gaps
    }


def _line(outcome: Outcome) -> str:
    return f"{outcome.case}: {outcome.perplexity:.3f} ({outcome.seconds:.1f} s)"
