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
class Span:
    """What lies between two numbers, in the row `name`: a bar with `words` behind it, or an interval about `middle`."""

    name: str
    low: float
    high: float
    number: int
    words: str = ""
    middle: float | None = None


def span_chart(title: str, spans: Sequence[Span], x_name: str, key: tuple[KeyEntry, ...]) -> Chart:
    """Return spans row by row; those of one name share a row, one a little below the other."""
    names = list(dict.fromkeys(span.name for span in spans))
    marks = ticks(min(span.low for span in spans), max(span.high for span in spans), 6)
    scale = Scale(marks[0], marks[-1], 16 + LETTER * max(map(len, names)), WIDTH - RIGHT)
    drawing = _axis(names, marks, scale, x_name)
    for span in spans:
        own = [other for other in spans if other.name == span.name]
        y = TOP + ROW * (names.index(span.name) + (own.index(span) + 1) / (len(own) + 1))
        drawing += _span(span, scale, y, (ROW - 8) / len(own))
    return Chart(title, f"{title}: {len(spans)} spans", WIDTH, TOP + len(names) * ROW + BOTTOM, drawing, key)


def _axis(names: Sequence[str], marks: Sequence[float], scale: Scale, x_name: str) -> str:
    bottom = TOP + len(names) * ROW
    parts = [text((scale.start + scale.stop) / 2, bottom + 36, x_name, anchor="middle")]
    for mark in marks:
        x = round(scale.place(mark), 1)
        parts += [grid_line(x, TOP, x, bottom), text(x, bottom + 18, short(mark), anchor="middle")]
    for row, name in enumerate(names):
        parts.append(text(scale.start - 8, TOP + (row + 0.5) * ROW + 4, name, anchor="end"))
    return "".join(parts)


def _span(span: Span, scale: Scale, y: float, height: float) -> str:
    low, high = round(scale.place(span.low), 1), round(scale.place(span.high), 1)
    look = colour(span.number)
    if span.middle is None:
        width = max(1.0, high - low)
        bar = (
            f'<rect x="{low}" y="{y - height / 2:.1f}" width="{width:.1f}" height="{height:.1f}" rx="2" fill="{look}"/>'
        )
        return bar + text(high + 6, y + 4, span.words)
    path = f"M{low} {y - 4:.1f}v8m0 -4H{high}m0 -4v8"
    dot = f'<circle cx="{scale.place(span.middle):.1f}" cy="{y:.1f}" r="4" fill="{look}"/>'
    return f'<path d="{path}" fill="none" stroke="{look}" stroke-width="2"/>{dot}'


__all__ = ["Span", "span_chart"]
