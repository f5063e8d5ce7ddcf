"""What stands on the page of a recording, from top to bottom."""

from __future__ import annotations

from typing import Any

from quantdock.profiling import listings
from quantdock.profiling.charts import Curve, Level, colour, format_time, lanes, plot, time_axis
from quantdock.profiling.digest import LOAD_STAGE, Material
from quantdock.profiling.markup import Markup, element, joined
from quantdock.profiling.sheets import quiet
from quantdock.tables import format_bytes

ROWS = 32
"""Threads that get a row in the timeline, at most."""


def title(data: dict[str, Any]) -> str:
    """The model's class and where it came from, as far as the load got."""
    plan = data["plan"]
    return "a load" if plan is None else f"{plan['model']} from {plan['source'].get('name', '?')}"


def header(data: dict[str, Any]) -> Markup:
    """What was loaded, how it ended, and the error if there was one."""
    said = {"loaded": "loaded", "failed": "failed", "unfinished": "not loaded to the end"}[data["outcome"]]
    parts = [
        element("p", f"quantdock {data['quantdock']} · {data['recorded']}", class_="quiet"),
        element("h1", title(data), " ", element("span", said, class_=f"badge {data['outcome']}")),
    ]
    if data["error"] is not None:
        message = element("pre", data["error"]["message"] or "(no message)")
        parts.append(element("div", element("strong", data["error"]["type"]), message, class_="error", role="alert"))
    return element("header", *parts)


def all_of(data: dict[str, Any], material: Material) -> list[Markup]:
    """Everything below the header."""
    return [
        _tiles(data),
        _section("Memory", _memory(data)),
        _section("In flight", _in_flight(data)),
        _section("Throughput", _throughput(data)),
        _section("Timeline", _timeline(data, material)),
        element(
            "div", _section("Stages", listings.stages(data)), _section("Work", listings.kinds(data)), class_="columns"
        ),
        _section("Threads", listings.threads(data)),
        _section("Slowest parameters", listings.parameters(data)),
        _section("What became of the parameters", listings.groups(data)),
        element(
            "div",
            _section("Source and plan", listings.plan(data)),
            _section("Machine", listings.machine(data)),
            class_="columns",
        ),
    ]


def _section(name: str, content: Markup) -> Markup:
    return element("section", element("h2", name), content)


# Numbers at a glance --------------------------------------------------------------------------------------------------


def _tiles(data: dict[str, Any]) -> Markup:
    plan, report, memory = data["plan"], data["report"], data["memory"]
    engine = sum(stage["seconds"] for stage in data["stages"] if stage["name"] == LOAD_STAGE)
    share = f"{format_time(engine)} of it in the engine" if engine else "the engine didn't start"
    tiles = [("Time", format_time(data["seconds"]), share)]
    if plan is not None:
        stored = plan["stored_nbytes"]
        rate = f"{format_bytes(int(stored / engine))}/s" if engine and report is not None else ""
        tiles.append(("Stored", format_bytes(stored), rate))
        predicted = f"predicted {format_bytes(plan['resident_nbytes'])}"
        if report is not None:
            off = report["measured_nbytes"] - report["predicted_nbytes"]
            said = "as predicted, to the byte" if not off else f"{off:+,} bytes beside what was predicted"
            tiles.append(("Model in memory", format_bytes(report["measured_nbytes"]), said))
        else:
            tiles.append(("Model in memory", "-", predicted))
    if memory["known"]:
        before = memory["baseline"]
        grown = "" if before is None else f"{format_bytes(before)} of it before the engine started"
        tiles.append(("Process, peak", format_bytes(memory["peak"]), grown))
    if plan is not None:
        peak = report["in_flight_peak_nbytes"] if report is not None else memory["in_flight_peak"]
        tiles.append(("In flight, peak", format_bytes(peak), f"budget {format_bytes(plan['memory_budget'])}"))
        tiles.append(("Workers", str(plan["workers"]), _busy(data, engine)))
    boxes = [
        element("div", element("dt", name), element("dd", value), element("dd", note, class_="quiet"))
        for name, value, note in tiles
    ]
    return element("dl", *boxes, class_="tiles")


def _busy(data: dict[str, Any], engine: float) -> str:
    worked = sum(kind["seconds"] for kind in data["kinds"] if kind["kind"] != "wait")
    return f"{min(1.0, worked / engine / data['plan']['workers']):.0%} busy" if engine and worked else ""


# Curves ---------------------------------------------------------------------------------------------------------------


def _band(data: dict[str, Any]) -> tuple[float, float] | None:
    stage = next((stage for stage in data["stages"] if stage["name"] == LOAD_STAGE), None)
    return None if stage is None else (stage["start"], stage["start"] + stage["seconds"])


def _legend(*items: tuple[str, str]) -> Markup:
    keys = [element("li", element("i", class_=f"key {name}"), text) for name, text in items]
    return element("ul", *keys, class_="legend")


def _memory(data: dict[str, Any]) -> Markup:
    memory = data["memory"]
    if not memory["known"]:
        return quiet(f"Not sampled: {memory['sampled']}.")
    total = [own + mapped for own, mapped in zip(memory["own"], memory["mapped"], strict=True)]
    levels = [
        Level(f"predicted-{name}", value, f"{text} {format_bytes(value)}")
        for name, text in (("loaded", "predicted, loaded"), ("peak", "predicted peak, at most"))
        if memory["predicted"] is not None and (value := memory["predicted"][name])
    ]
    curves = [Curve("own", memory["own"], area=True), Curve("mapped", total, area=True, floor=memory["own"])]
    chart = plot(memory["at"], data["seconds"], curves, levels, title=_memory_text(memory), band=_band(data))
    legend = _legend(("c-own", "the process's own"), ("c-mapped", "pages of mapped files"), ("band", "engine at work"))
    text = f"{_memory_text(memory)} Sampled: {memory['sampled']}."
    if levels:
        text += (
            " The predictions stand on what the process held when the engine started; pages of a mapped file that "
            "nobody has touched are predicted, but not resident."
        )
    return joined(legend, chart, quiet(text))


def _memory_text(memory: dict[str, Any]) -> str:
    text = f"The process held {format_bytes(memory['peak'])} at most."
    if memory["predicted"] is not None:
        loaded, peak = (format_bytes(memory["predicted"][name]) for name in ("loaded", "peak"))
        text += f" Predicted: {loaded} when loaded, {peak} at most on the way."
    return text


def _in_flight(data: dict[str, Any]) -> Markup:
    memory, plan = data["memory"], data["plan"]
    if plan is None:
        return quiet("There is no plan, so there was no budget.")
    budget = plan["memory_budget"]
    text = f"{format_bytes(memory['in_flight_peak'])} at most was seen, of a budget of {format_bytes(budget)}."
    if plan["largest_unit_nbytes"] > budget:
        text += f" One unit needs {format_bytes(plan['largest_unit_nbytes'])} and runs alone."
    levels = [Level("budget", budget, f"budget {format_bytes(budget)}")]
    curve = Curve("in-flight", memory["in_flight"], area=True)
    return joined(
        plot(memory["at"], data["seconds"], [curve], levels, title=text, band=_band(data)),
        quiet(f"Bytes that are neither in a file nor in the model. {text}"),
    )


def _throughput(data: dict[str, Any]) -> Markup:
    rates = data["rates"]
    if not any(map(any, (rates["read"], rates["quantize"]))):
        return quiet("Nothing was read or quantized.")
    times = [index * rates["interval"] for index in range(len(rates["read"]))]
    curves = [Curve("read", rates["read"], area=True), Curve("quantize", rates["quantize"])]
    highest = {kind: f"{format_bytes(max(rates[kind]))}/s" for kind in ("read", "quantize")}
    text = f"At most {highest['read']} read and {highest['quantize']} quantized, in {format_time(rates['interval'])}."
    return joined(
        _legend(("c-read", "bytes read"), ("c-quantize", "bytes quantized")),
        plot(times, data["seconds"], curves, [], title=text, suffix="/s", band=_band(data)),
        quiet(f"{text} The bytes of a step are spread evenly over its time."),
    )


# The timeline ---------------------------------------------------------------------------------------------------------


def _timeline(data: dict[str, Any], material: Material) -> Markup:
    threads = [(name, worked) for (name, _), worked in material.worked.items()][:ROWS]
    seconds = data["seconds"]
    stages = [
        element(
            "span",
            stage["name"],
            class_="stage failed" if stage["failed"] else "stage",
            style=f"left:{100 * stage['start'] / seconds:.3f}%;width:{100 * stage['seconds'] / seconds:.3f}%",
            title=f"{stage['name']}: {format_time(stage['seconds'])}",
            data_start=stage["start"],
            data_seconds=stage["seconds"],
        )
        for stage in data["stages"]
    ]
    names = [element("span", "stages"), *(element("span", name) for name, _ in threads)]
    drawn = element("div", lanes(threads, material.start, material.end), class_="lanes") if threads else Markup()
    kinds = [kind["kind"] for kind in data["kinds"]]
    notes = []
    if not threads:
        notes.append("No step was recorded: the engine hadn't started yet, or there was nothing to do.")
    if len(material.worked) > len(threads):
        notes.append(f"{len(material.worked) - len(threads)} more threads are only in the table below.")
    if data["timeline"]["left_out"]:
        notes.append(f"Pointing shows the {len(data['timeline']['spans'])} longest steps only.")
    return joined(
        _legend(*((f"bar {colour(kind)}", kind) for kind in kinds), ("bar failed", "failed")),
        element(
            "div",
            element("div", *names, class_="names"),
            element("div", element("div", *stages, class_="stages"), drawn, class_="canvas"),
            time_axis(seconds),
            class_="plot timeline",
            style=f"--rows:{len(threads)}",
        ),
        quiet(" ".join(notes)) if notes else Markup(),
    )
