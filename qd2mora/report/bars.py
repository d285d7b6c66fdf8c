"""Bars and intervals, a row each: what a plan's memory goes to, and how sure arms of a comparison are."""

from collections.abc import Sequence
from dataclasses import dataclass

from qd2mora.report.chart import Chart, KeyEntry, grid_line, short, text
from qd2mora.report.page import colour
from qd2mora.report.scales import Scale, ticks

WIDTH, ROW = 760, 26
RIGHT, TOP, BOTTOM = 60, 8, 40
LETTER = 7.0
"""Width of a letter, about."""


@dataclass(frozen=True)
class Bar:
    """A row's length, the number of its colour, and what is written behind it."""

    name: str
    length: float
    number: int
    value: str


@dataclass(frozen=True)
class Interval:
    """A value and what it lies within, in the row `name`; `number` of its colour."""

    name: str
    middle: float
    low: float
    high: float
    number: int


def bar_chart(title: str, bars: Sequence[Bar], x_name: str, key: tuple[KeyEntry, ...]) -> Chart:
    """Return bars from zero, one below the other."""
    names = [bar.name for bar in bars]
    scale, drawing = _rows(names, [0.0, *(bar.length for bar in bars)], x_name)
    for row, bar in enumerate(bars):
        end, y = scale.place(bar.length), TOP + row * ROW
        width = max(1.0, end - scale.start)
        box = f'x="{scale.start}" y="{y + 4}" width="{width:.1f}" height="{ROW - 8}" rx="2"'
        drawing += f'<rect {box} fill="{colour(bar.number)}"/>'
        drawing += text(round(end, 1) + 6, y + ROW / 2 + 4, bar.value)
    about = f"{title}: {len(bars)} bars"
    return Chart(title, about, WIDTH, TOP + len(bars) * ROW + BOTTOM, drawing, key)


def interval_chart(title: str, intervals: Sequence[Interval], x_name: str, key: tuple[KeyEntry, ...]) -> Chart:
    """Return values with their intervals; those of one name share a row, one a little below the other."""
    names = list(dict.fromkeys(each.name for each in intervals))
    ends = [end for each in intervals for end in (each.low, each.high)]
    scale, drawing = _rows(names, ends, x_name)
    for each in intervals:
        own = [other for other in intervals if other.name == each.name]
        y = TOP + ROW * (names.index(each.name) + (own.index(each) + 1) / (len(own) + 1))
        low, middle, high = (round(scale.place(number), 1) for number in (each.low, each.middle, each.high))
        stroke = f'stroke="{colour(each.number)}" stroke-width="2"'
        drawing += f'<line x1="{low}" x2="{high}" y1="{y:.1f}" y2="{y:.1f}" {stroke}/>'
        for end in (low, high):
            drawing += f'<line x1="{end}" x2="{end}" y1="{y - 4:.1f}" y2="{y + 4:.1f}" {stroke}/>'
        drawing += f'<circle cx="{middle}" cy="{y:.1f}" r="4" fill="{colour(each.number)}"/>'
    about = f"{title}: {len(intervals)} values with their intervals"
    return Chart(title, about, WIDTH, TOP + len(names) * ROW + BOTTOM, drawing, key)


def _rows(names: Sequence[str], numbers: Sequence[float], x_name: str) -> tuple[Scale, str]:
    """Return the scale of the numbers, and the names of rows on the left with the axis below."""
    left = 16 + LETTER * max(map(len, names))
    bottom = TOP + len(names) * ROW
    marks = ticks(min(numbers), max(numbers), 6)
    scale = Scale(marks[0], marks[-1], left, WIDTH - RIGHT)
    parts = []
    for mark in marks:
        x = round(scale.place(mark), 1)
        parts.append(grid_line(x, TOP, x, bottom))
        parts.append(text(x, bottom + 18, short(mark), anchor="middle"))
    for row, name in enumerate(names):
        parts.append(text(left - 8, TOP + (row + 0.5) * ROW + 4, name, anchor="end"))
    parts.append(text((left + WIDTH - RIGHT) / 2, bottom + 36, x_name, anchor="middle"))
    return scale, "".join(parts)


__all__ = ["Bar", "Interval", "bar_chart", "interval_chart"]
