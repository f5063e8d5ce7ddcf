"""Recordings of loads, and the page that shows one."""

from __future__ import annotations

import json
import mmap
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from typer.testing import CliRunner

import quantdock
from quantdock import LoadError, QuantdockError, calls, profiling
from quantdock.cli.app import app
from quantdock.profiling.charts import byte_ticks, time_ticks
from quantdock.profiling.digest import Span, segments
from quantdock.profiling.sampler import MOST, Sample, Sampler, linux_probe
from quantdock.testing import SmallModel, installed_plugin, write_checkpoint

EXAMPLE = Path(__file__).parents[2] / "tests" / "toy_plugin" / "quantdock_toy.py"
HOSTILE = "a.</script><script>document.title='taken'</script>\"'><img src=x onerror=alert(1)>&amp;"


class Page(HTMLParser):
    """What a browser finds in a page: elements, the text of each kind of element, and the data in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open = ""
        self.feed(text)
        self.close()
        scripts = [attributes for name, attributes in self.elements if name == "script"]
        assert scripts == [{"type": "application/json", "id": "data"}, {}]
        self.data = json.loads(self.texts["script"][0])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open = tag

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self._open, []).append(data)

    def texts_of(self, tag: str) -> str:
        return "\n".join(self.texts.get(tag, []))


def page_of(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def written(recording: profiling.Recording, folder: Path) -> Page:
    return page_of(recording.write(folder / "page.html"))


# Recording ------------------------------------------------------------------------------------------------------------


def test_threads_are_recorded_side_by_side() -> None:
    both = threading.Barrier(2)

    def work(recorder: profiling.Recorder) -> None:
        for index in range(300):
            with recorder.span("quantize", f"{threading.current_thread().name}.{index}", 10):
                if index == 0:
                    both.wait()

    with profiling.record() as recording:
        recorder = profiling.current()
        threads = [threading.Thread(target=work, args=(recorder,), name=f"w-{index}") for index in (2, 10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    data = recording.to_dict()
    assert [thread["name"] for thread in data["threads"]] == ["w-2", "w-10"]
    timeline = data["timeline"]
    assert len(timeline["spans"]) == 600
    for _, label, thread, start, length, nbytes, failed in timeline["spans"]:
        assert timeline["labels"][label].startswith(timeline["threads"][thread] + ".")
        assert 0 <= start <= start + length <= data["seconds"] * 1e6 + 1
        assert (nbytes, failed) == (10, 0)
    (kind,) = data["kinds"]
    assert (kind["kind"], kind["spans"], kind["nbytes"]) == ("quantize", 600, 6000)
    first = [row for row in timeline["spans"] if timeline["labels"][row[1]].endswith(".0")]
    assert max(row[3] for row in first) <= min(row[3] + row[4] for row in first), "they met inside of the span"


def test_only_the_thread_that_records_is_recorded() -> None:
    seen = []
    with profiling.record() as recording:
        other = threading.Thread(target=lambda: seen.append(profiling.current()))
        other.start()
        other.join()
        assert profiling.current() is recording
    assert seen == [profiling.current()]
    assert seen[0] is not recording
    with seen[0].span("read", "nobody"), seen[0].stage("nobody"):
        pass
    assert recording.to_dict()["timeline"]["spans"] == []


def test_nested_time_counts_once() -> None:
    with profiling.record() as recording, recording.span("read", "p", 8):
        time.sleep(0.01)
        with recording.span("quantize", "p", 4):
            time.sleep(0.02)
    kinds = {kind["kind"]: kind for kind in recording.to_dict()["kinds"]}
    assert kinds["quantize"]["seconds"] >= 0.02
    assert kinds["read"]["seconds"] >= 0.01
    assert kinds["read"]["within"] == pytest.approx(kinds["read"]["seconds"] + kinds["quantize"]["seconds"], abs=1e-6)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 20), st.sampled_from("abc")), max_size=12))
def test_segments_cover_exactly_what_the_spans_cover(drawn: list[tuple[int, int, str]]) -> None:
    """Also of spans that overlap, as two threads of one name and ident could leave them."""
    spans = [Span(kind, kind, ("t", 1), start, start + length, 1, False) for start, length, kind in drawn]
    found = segments(spans)
    covered = {moment for span in spans for moment in range(span.start, span.end)}
    assert [moment for one in found for moment in range(one.start, one.end)] == sorted(covered)
    assert all(one.span.start <= one.start < one.end <= one.span.end for one in found)


def test_rates_add_up_to_the_bytes() -> None:
    with profiling.record() as recording:
        for index in range(20):
            with recording.span("read", f"p.{index}", 12_345):
                time.sleep(0.001)
    rates = recording.to_dict()["rates"]
    assert sum(rates["read"]) * rates["interval"] == pytest.approx(20 * 12_345, rel=1e-3)
    assert not any(rates["quantize"])


def test_an_error_is_recorded_and_goes_on(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="broken"),
        profiling.record(tmp_path / "page.html") as recording,
        recording.stage("load"),
        recording.span("quantize", "p.weight"),
    ):
        raise ValueError("broken <b>here</b>")
    data = page_of(tmp_path / "page.html").data
    assert (data["outcome"], data["error"]) == ("failed", {"type": "ValueError", "message": "broken <b>here</b>"})
    assert [row[6] for row in data["timeline"]["spans"]] == [1]
    assert [stage["failed"] for stage in data["stages"]] == [True]
    page = page_of(tmp_path / "page.html")
    assert "broken <b>here</b>" in page.texts_of("pre")
    assert "b" not in [name for name, _ in page.elements]


# Memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_follows_the_process(tmp_path: Path) -> None:
    file = tmp_path / "zeros"
    file.write_bytes(bytes(32 << 20))
    with profiling.record() as recording:
        recording.watch(lambda: 77)
        before = linux_probe()
        # A map of its own: malloc might hand out memory that an earlier test left resident.
        held = torch.frombuffer(mmap.mmap(-1, 32 << 20, mmap.MAP_PRIVATE), dtype=torch.uint8).fill_(1)
        mapped = torch.from_file(str(file), size=32 << 20, dtype=torch.uint8)
        assert int(mapped.sum()) == 0
        after = linux_probe()
        time.sleep(0.05)
    memory = recording.to_dict()["memory"]
    assert after[0] - before[0] > held.nbytes * 0.9
    assert after[1] - before[1] > mapped.nbytes * 0.9
    assert max(memory["own"]) - memory["own"][0] > held.nbytes * 0.9
    assert max(memory["mapped"]) - memory["mapped"][0] > mapped.nbytes * 0.9
    assert max(memory["in_flight"]) == memory["in_flight_peak"] == 77
    assert memory["at"] == sorted(memory["at"])
    assert memory["at"][-1] <= recording.to_dict()["seconds"]


def test_a_long_recording_keeps_few_samples_and_all_peaks() -> None:
    sampler = Sampler((None, "made up"))
    for at in range(20 * MOST + 1):
        sampler.keep(Sample(at, 5_000 if at == 777 else 1, 9_000 if at == 20 * MOST else 2, 3))
    samples = sampler.samples
    assert MOST // 4 < len(samples) <= MOST
    assert [max(sample[column] for sample in samples) for column in (1, 2, 3)] == [5_000, 9_000, 3]
    assert [sample.at for sample in samples] == sorted({sample.at for sample in samples})


def test_without_a_way_to_see_memory_the_page_says_so(tmp_path: Path) -> None:
    recording = profiling.Recording(Sampler((None, "this system doesn't tell")))
    recording.begin()
    recording.end()
    page = written(recording, tmp_path)
    assert "Not sampled: this system doesn't tell." in page.texts_of("p")
    assert page.data["memory"]["predicted"] is None


# The page -------------------------------------------------------------------------------------------------------------


def test_names_are_text(tmp_path: Path) -> None:
    with profiling.record() as recording:
        for kind in ("quantize", HOSTILE):
            with recording.span(kind, HOSTILE, 5), recording.stage(HOSTILE):
                pass
    page = written(recording, tmp_path)  # `Page` has checked that there are two scripts, ours
    assert page.data["timeline"]["labels"] == [HOSTILE]
    assert page.data["parameters"][0]["name"] == HOSTILE
    assert HOSTILE in page.texts_of("td")
    assert "img" not in [name for name, _ in page.elements]
    assert not [key for _, attributes in page.elements for key in attributes if key.startswith("on")]


@given(st.text(max_size=60))
def test_any_name_survives(name: str) -> None:
    recording = profiling.Recording(Sampler((None, "")))
    recording.begin()
    with recording.span("read", name):
        pass
    recording.end()
    with tempfile.TemporaryDirectory() as folder:
        page = written(recording, Path(folder))
    assert page.data["timeline"]["labels"] == [name]


def test_nothing_is_fetched_and_no_other_script_runs(tmp_path: Path) -> None:
    with profiling.record() as recording:
        pass
    page = written(recording, tmp_path)
    assert not [pair for _, pair in page.elements if {"src", "href", "srcset", "action"} & pair.keys()]
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|innerHTML|eval\(", "".join(page.texts["script"]))
    (policy,) = [pair["content"] for _, pair in page.elements if pair.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-")


def test_thousands_of_parameters_fit_into_a_mebibyte(tmp_path: Path) -> None:
    def work(recorder: profiling.Recorder, worker: int) -> None:
        for index in range(2_000):
            label = f"model.layers.{index}.mlp.experts.{worker}.down_projection.weight"
            with (
                recorder.span("read", label, 1 << 20),
                recorder.span("convert", label),
                recorder.span("quantize", label),
            ):
                pass

    with profiling.record() as recording:
        threads = [threading.Thread(target=work, args=(recording, worker)) for worker in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with recording.span("read", "x" * 5_000_000):
            time.sleep(0.1)
    page = written(recording, tmp_path)
    assert (tmp_path / "page.html").stat().st_size < 1 << 20
    data = page.data
    assert len(data["timeline"]["spans"]) + data["timeline"]["left_out"] == 8 * 3 * 2_000 + 1
    assert sum(kind["spans"] for kind in data["kinds"]) == 8 * 3 * 2_000 + 1
    assert [one["seconds"] for one in data["parameters"]] == sorted(p["seconds"] for p in data["parameters"])[::-1]
    assert max(len(label) for label in data["timeline"]["labels"] if label.startswith("xxx")) < 200
    assert len(recording.to_dict()["parameters"]) == 8 * 2_000 + 1


def test_the_page_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with profiling.record() as recording:
        pass
    (tmp_path / "page.html").write_text("old")
    (tmp_path / "page.html").chmod(0o640)
    recording.write(tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_mode & 0o777 == 0o640
    assert page_of(tmp_path / "page.html").data["outcome"] == "unfinished"
    (tmp_path / "folder").mkdir()
    with pytest.raises(QuantdockError, match=r"folder: the profile can't be written there \(Is a directory\)"):
        recording.write(tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "page.html"]


def test_an_error_of_the_load_comes_before_one_of_the_page(tmp_path: Path) -> None:
    with pytest.raises(KeyError) as raised, profiling.record(tmp_path / "none" / "page.html"):
        raise KeyError("the load's")
    assert "the profile can't be written there" in raised.value.__notes__[0]
    with pytest.raises(QuantdockError, match="No such file or directory"), profiling.record(tmp_path / "none" / "x"):
        pass


@given(st.floats(1e-6, 1e5))
def test_time_ticks_are_few_round_and_inside(seconds: float) -> None:
    ticks = time_ticks(seconds)
    assert 2 <= len(ticks) <= 9
    assert ticks[0][0] == 0
    assert ticks[-1][0] <= seconds * (1 + 1e-6)
    assert len({text for _, text in ticks}) == len(ticks)


@given(st.integers(1, 1 << 50))
def test_byte_ticks_are_few_and_inside(highest: int) -> None:
    ticks = byte_ticks(highest)
    assert 2 <= len(ticks) <= 6
    assert 0 == ticks[0] < ticks[-1] <= highest


# quantdock load --profile ---------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of the small model; the command line builds that model."""
    monkeypatch.delenv("QUANTDOCK_POLICY", raising=False)
    write_checkpoint(tmp_path / "source")
    plan = calls.plan
    monkeypatch.setattr(calls, "plan", lambda source, **options: plan(source, model=SmallModel, **options))
    return tmp_path / "source"


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["load", *arguments, "--no-sample"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_load_with_a_profile(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.html"
    code, out, _ = run(str(source), "--profile", str(target), "--workers", "2", "--memory-budget", "4MiB", "--json")
    assert code == 0
    report = json.loads(out)
    assert report["profile"] == str(target)
    page = page_of(target)
    data: dict[str, Any] = page.data
    assert (data["outcome"], data["error"]) == ("loaded", None)
    assert data["plan"]["resident_nbytes"] == report["measured_nbytes"] == data["report"]["measured_nbytes"]
    assert (data["plan"]["memory_budget"], data["plan"]["workers"]) == (4 << 20, 2)
    assert data["plan"]["model"] == "SmallModel"
    stored = [name for name in SmallModel({"features": 64, "dtype": "bfloat16"}).state_dict() if name != "head.weight"]
    assert {parameter["name"] for parameter in data["parameters"]} == set(stored)
    assert {row[6] for row in data["timeline"]["spans"]} == {0}
    stages = {stage["name"]: stage["seconds"] for stage in data["stages"]}
    assert {"import", "resolve_config", "find_checkpoints", "build_model", "load", "postprocess_model"} <= stages.keys()
    assert stages["load"] == pytest.approx(report["seconds"]["load"], abs=0.05)
    predicted = data["memory"]["predicted"]
    if data["memory"]["known"]:
        assert predicted["loaded"] - data["memory"]["baseline"] == report["predicted_nbytes"]
        assert predicted["peak"] >= predicted["loaded"]
    assert data["versions"]["torch"] == torch.__version__
    assert data["versions"]["quantdock"] == quantdock.__version__
    assert "SmallModel from" in page.texts_of("h1")
    assert "as predicted, to the byte" in page.texts_of("dd")
    assert "blocks.*.up.weight x2" in page.texts_of("td")


SLICED = """
import dataclasses
from quantdock import Slices
from quantdock_toy import ToyConfig, ToyQuantizer, quantize

class Config(ToyConfig):
    quant_method = "sliced"

class Sliced(ToyQuantizer):
    config_class = Config

    def layout(self, parameter):
        layout = super().layout(parameter)
        if parameter.name != "large.weight":
            return layout
        return dataclasses.replace(layout, slices=Slices(dim=0, multiple=16, working_bytes=4096, working_copies=4))

    def quantize_slice(self, parameter, tensor, start, parts):
        if parameter.spec.shape[1] == 1000:
            raise RuntimeError("the kernel said no")
        stop = start + len(tensor)
        parts["weight"][start:stop], parts["weight_scale"][start:stop] = quantize(tensor)
"""


class Two(torch.nn.Module):
    def __init__(self, config: dict[str, int]) -> None:
        super().__init__()
        self.large = torch.nn.Linear(config["width"], 12600, bias=False)
        self.small = torch.nn.Linear(32, 32, bias=False)


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Path]:
    """A model, and a method that quantizes its larger parameter slice by slice."""
    modules = {"quantdock_toy": EXAMPLE.read_text(encoding="utf-8"), "sliced_toy": SLICED}
    entry_points = {"quantdock.quantizers": {"sliced": "sliced_toy:Sliced"}}
    with installed_plugin(
        tmp_path / "site", dist="sliced-toy", version="1.0", entry_points=entry_points, modules=modules
    ):
        yield tmp_path / "two"


def recorded(folder: Path, page: Path, *, width: int, dtype: torch.dtype) -> None:
    folder.mkdir()
    state = {name: tensor.to(dtype) for name, tensor in Two({"width": width}).state_dict().items()}
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"width": width}))
    with profiling.record(page):
        plan = quantdock.plan(folder, model=Two, quantize={"quant_method": "sliced"}, dtype="bfloat16", workers=2)
        assert {unit.targets[0].parameter.name: unit.cut is not None for unit in plan.units} == {
            "large.weight": True, "small.weight": False,
        }  # fmt: skip
        plan.execute()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["from the map", "copied and cast"])
def test_the_engine_tells_what_it_does(two: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """Whole and in slices: the bytes of the spans are those of the file and of the parameters."""
    recorded(two, tmp_path / "page.html", width=2048, dtype=dtype)
    data = page_of(tmp_path / "page.html").data
    count = 12600 * 2048 + 32 * 32
    kinds = {kind["kind"]: kind for kind in data["kinds"]}
    assert kinds["quantize"]["nbytes"] == count * 2
    assert kinds["read"]["nbytes"] == count * dtype.itemsize
    assert kinds["quantize"]["spans"] > 3
    assert {parameter["name"] for parameter in data["parameters"]} == {"large.weight", "small.weight"}
    assert {thread["name"] for thread in data["threads"]} <= {"MainThread", "quantdock-0", "quantdock-1"}
    assert data["memory"]["in_flight_peak"] > 0
    (load,) = [stage for stage in data["stages"] if stage["name"] == "load"]
    begun, ended = load["start"] * 1e6 - 1, (load["start"] + load["seconds"]) * 1e6 + 1
    assert all(begun <= row[3] <= row[3] + row[4] <= ended for row in data["timeline"]["spans"])


def test_the_step_that_failed_is_marked(two: Path, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="the kernel said no"):
        recorded(two, tmp_path / "page.html", width=1000, dtype=torch.bfloat16)
    page = page_of(tmp_path / "page.html")
    assert (page.data["outcome"], page.data["error"]["type"]) == ("failed", "LoadError")
    timeline = page.data["timeline"]
    failed = {(timeline["kinds"][row[0]], timeline["labels"][row[1]]) for row in timeline["spans"] if row[6]}
    assert ("quantize", "large.weight") in failed
    assert "bar failed" in [pair.get("class") for name, pair in page.elements if name == "path"]


def test_a_failed_load_leaves_a_profile(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.html"
    save_file({"unexpected<b>": torch.zeros(2)}, source / "model.safetensors")
    code, _, err = run(str(source), "--profile", str(target))
    assert code == 1
    page = page_of(target)
    assert page.data["outcome"] == "failed"
    assert page.data["error"]["type"] == "LedgerError"
    assert "unexpected<b>" in page.data["error"]["message"]
    assert page.data["error"]["message"].splitlines()[0] in err
    assert page.data["plan"] is None
    assert page.data["stages"][-1] == page.data["stages"][-1] | {"name": "match", "failed": True}


def test_no_profile_no_file(source: Path, tmp_path: Path) -> None:
    code, out, _ = run(str(source), "--json")
    assert (code, json.loads(out)["profile"]) == (0, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("target", ["", "none/out.html"])
def test_a_profile_that_can_not_be_written_stops_before_the_load(target: str, tmp_path: Path) -> None:
    code, out, err = run("/no/such/source", "--profile", str(tmp_path / target))
    assert (code, out) == (2, "")
    assert "--profile" in err


def test_importing_quantdock_imports_none_of_it() -> None:
    code = (
        "import sys, quantdock\n"
        "assert not [name for name in sys.modules if 'profiling' in name]\n"
        "from quantdock.profiling.recorder import current\n"
        "found = {name for name in sys.modules if name.startswith('quantdock.profiling.')}\n"
        "assert found == {'quantdock.profiling.recorder'}, found\n"
        "from quantdock import profiling\n"
        "profiling.record\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
