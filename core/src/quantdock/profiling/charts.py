"""Plots as inline SVG that stretches: times run from 0 to 1000, heights from 0 to 100; text stands beside it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from quantdock.profiling.digest import Segment
from quantdock.profiling.markup import Markup, element
from quantdock.tables import format_bytes

WIDTH, HEIGHT = 1000, 100
LANE = 24
"""Height of a thread's row, with the gap below it."""
_BAR = 18
_KINDS = ("read", "convert", "quantize", "place", "wait")
_RECTANGLES = 8000
"""Drawn at most in all rows together."""


class Curve(NamedTuple):
    """Values over time; ``area`` fills what is below, down to ``floor``."""

    name: str
    values: Sequence[float]
    area: bool = False
    floor: Sequence[float] | None = None


class Level(NamedTuple):
    """A horizontal line."""

    name: str
    value: float
    text: str


def colour(kind: str) -> str:
    """The class that gives a kind its colour; kinds without one of their own share one."""
    return f"k-{kind}" if kind in _KINDS else "k-other"


def plot(
    times: Sequence[float],
    seconds: float,
    curves: Sequence[Curve],
    levels: Sequence[Level],
    *,
    title: str,
    suffix: str = "",
    band: tuple[float, float] | None = None,
) -> Markup:
    """A chart of bytes over time.

    Args:
        times: seconds at which the curves have their values.
        seconds: length of the time axis.
        curves: drawn one over the other.
        levels: what the curves are to be compared with.
        title: what a screen reader says.
        suffix: of the numbers beside the axis.
        band: a stretch of time that is set off.
    """
    highest = max([*(value for curve in curves for value in curve.values), *(level.value for level in levels), 1])
    ticks = byte_ticks(highest)
    top = max(highest, ticks[-1]) * 1.04
    shapes = [_band(band, seconds)] if band is not None else []
    shapes += [_rule(tick, top, "grid") for tick in ticks]
    for curve in curves:
        points = _points(times, curve.values, seconds, top)
        if curve.area:
            floor = _points(times, curve.floor or [0.0] * len(times), seconds, top)
            shapes.append(element("path", d=_path([*points, *reversed(floor)]) + "z", class_=f"area c-{curve.name}"))
        else:
            shapes.append(element("path", d=_path(points), class_=f"line c-{curve.name}"))
    shapes += [_rule(level.value, top, f"level c-{level.name}") for level in levels]
    picture = _picture(HEIGHT, title, *shapes)
    notes = [
        element("span", level.text, class_=f"note c-{level.name}", style=f"bottom:{_percent(level.value, top)}%")
        for level in levels
    ]
    beside = [element("span", format_short(tick) + suffix, style=f"bottom:{_percent(tick, top)}%") for tick in ticks]
    return element(
        "div",
        element("div", *beside, class_="ticks-y", aria_hidden="true"),
        element("div", picture, *notes, class_="canvas"),
        time_axis(seconds),
        class_="plot",
    )


def time_axis(seconds: float) -> Markup:
    """Times below a plot."""
    ticks = time_ticks(seconds)
    spans = [element("span", text, style=f"left:{100 * tick / seconds:.3f}%") for tick, text in ticks]
    return element("div", *spans, class_="ticks-x", aria_hidden="true")


def lanes(threads: Sequence[tuple[str, Sequence[Segment]]], start: int, end: int) -> Markup:
    """One row per thread, coloured by what it was doing.

    A thread with more to show than there is room for is drawn as columns: as much of a column is filled as the thread
    was busy in it.
    """
    columns = max(20, min(400, _RECTANGLES // (3 * max(1, len(threads)))))
    shapes = []
    for row, (_, worked) in enumerate(threads):
        drawn = _exact(worked) if len(worked) <= 3 * columns else _columns(worked, start, end, columns)
        paths: dict[str, list[str]] = defaultdict(list)
        for name, begun, length, low, high in drawn:
            x, width = WIDTH * (begun - start) / (end - start), WIDTH * length / (end - start)
            y, height = row * LANE + _BAR * (1 - high), _BAR * (high - low)
            paths[name].append(f"M{x:.6g} {y:.4g}h{width:.3g}v{height:.3g}h-{width:.3g}z")
        shapes += [element("path", d="".join(parts), class_=f"bar {name}") for name, parts in paths.items()]
    return _picture(LANE * len(threads), "What each thread did when; the tables below have the numbers", *shapes)


_Drawn = tuple[str, int, int, float, float]
"""Class, start and length in nanoseconds, lower and upper edge as parts of the row's height."""


def _class(segment: Segment) -> str:
    return "failed" if segment.span.failed else colour(segment.span.kind)


def _exact(worked: Sequence[Segment]) -> list[_Drawn]:
    return [(_class(one), one.start, one.end - one.start, 0.0, 1.0) for one in worked]


def _columns(worked: Sequence[Segment], start: int, end: int, columns: int) -> list[_Drawn]:
    width = -(-(end - start) // columns)
    busy: list[dict[str, int]] = [defaultdict(int) for _ in range(columns)]
    for one in worked:
        for index in range((one.start - start) // width, min(columns, (one.end - 1 - start) // width + 1)):
            left = start + index * width
            busy[index][_class(one)] += min(one.end, left + width) - max(one.start, left)
    drawn: list[_Drawn] = []
    for index, shares in enumerate(busy):
        low = 0.0
        for name in sorted(shares):
            high = low + shares[name] / width
            drawn.append((name, start + index * width, width, low, high))
            low = high
    return drawn


def _picture(height: float, title: str, *shapes: Markup) -> Markup:
    return element(
        "svg", element("title", title), *shapes,
        viewBox=f"0 0 {WIDTH} {height}", preserveAspectRatio="none", role="img", class_="view",
    )  # fmt: skip


def _band(band: tuple[float, float], seconds: float) -> Markup:
    left, right = (WIDTH * time / seconds for time in band)
    return element("rect", x=f"{left:.2f}", y=0, width=f"{right - left:.2f}", height=HEIGHT, class_="band")


def _rule(value: float, top: float, name: str) -> Markup:
    y = f"{HEIGHT - HEIGHT * value / top:.2f}"
    return element("line", x1=0, x2=WIDTH, y1=y, y2=y, class_=name)


def _points(times: Sequence[float], values: Sequence[float], seconds: float, top: float) -> list[tuple[float, float]]:
    return [(WIDTH * time / seconds, HEIGHT - HEIGHT * value / top) for time, value in zip(times, values, strict=True)]


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in points) if points else ""


def _percent(value: float, top: float) -> str:
    return f"{100 * value / top:.2f}"


def byte_ticks(highest: float) -> list[int]:
    """About four round numbers from 0 up to ``highest`` bytes; round in powers of two."""
    step = 1 << max(0, math.ceil(math.log2(max(highest, 1) / 5)))
    return list(range(0, int(highest) + 1, step))


def format_short(amount: int) -> str:
    """``1.5 GiB``: as ``format_bytes``, without zeros at the end."""
    number, unit = format_bytes(amount).split(" ")
    return f"{number.rstrip('0').rstrip('.') if '.' in number else number} {unit}"


def time_ticks(seconds: float) -> list[tuple[float, str]]:
    """About eight round times from 0 up to ``seconds``, and how to write them."""
    power = 10.0 ** math.floor(math.log10(seconds / 8))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor * 8 >= seconds)
    unit, name = (1.0, "s") if step >= 0.1 else (1e3, "ms") if step >= 1e-4 else (1e6, "µs")
    count = int(seconds / step + 1e-9) + 1
    return [(index * step, f"{index * step * unit:.6g} {name}") for index in range(count)]


def format_time(seconds: float) -> str:
    """``1.25 s``, ``34.1 ms``, ``56 µs``."""
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} µs"
