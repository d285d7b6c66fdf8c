"""Routing and experts as pictures: a heat map of gates by layer, task and expert; experts on two axes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qd2mora.report.chart import Chart, text
from qd2mora.report.page import colour, escape

MAP_WIDTH = 404
"""Fits the narrowest card of a row of two."""
FULL = 2.0
"""Powers of two away from an equal share at which a cell has its full colour."""
GAP, LEFT, TOP, TALL = 6, 30, 20, 16
SIDE, EDGE = 250, 20


@dataclass(frozen=True)
class Usage:
    """Gates of one kind of router. `shares`: layer, task, expert; None where a task has none."""

    layers: Sequence[int]
    tasks: Sequence[str]
    shares: Sequence[Sequence[Sequence[float] | None]]


@dataclass(frozen=True)
class Dot:
    """An expert's place on two axes, its number, which is its colour's too, and its name."""

    x: float
    y: float
    number: int
    name: str


def usage_map(title: str, usage: Usage) -> Chart:
    """Return a heat map of gates: one row a layer, one group of columns a task, one column an expert.

    Colours tell how far a gate is from an equal share, on a scale of powers of two.
    """
    widest = max((len(row) for by_task in usage.shares for row in by_task if row), default=1)
    cell = max(6, min(26, int((MAP_WIDTH - LEFT - len(usage.tasks) * GAP) / (len(usage.tasks) * widest))))
    group = widest * cell + GAP
    width, height = LEFT + len(usage.tasks) * group, TOP + len(usage.layers) * TALL + 16
    parts = []
    for number, task in enumerate(usage.tasks):
        x = LEFT + number * group
        parts.append(
            f'<text class="tiny" x="{x}" y="{TOP - 7}">{escape(_fitted(task, group - GAP))}'
            f"<title>{escape(task)}</title></text>"
        )
        if cell >= 12:  # a narrower column has no room for its number
            parts += [
                text(x + (expert + 0.5) * cell, height - 3, str(expert), "tiny", "middle") for expert in range(widest)
            ]
    for row, layer in enumerate(usage.layers):
        y = TOP + row * TALL
        if len(usage.layers) <= 16 or layer % 4 == 0:
            parts.append(text(LEFT - 6, y + TALL - 4, str(layer), "tiny", "end"))
        for number, task in enumerate(usage.tasks):
            shares = usage.shares[row][number] or ()
            for expert, share in enumerate(shares):
                where = escape(f"layer {layer}, {task}, expert {expert}: {share:.1%}")
                x = LEFT + number * group + expert * cell
                parts.append(_cell(x, y, (cell, TALL), share * len(shares), f"<title>{where}</title>"))
    columns = f"{len(usage.tasks)} tasks and {widest} experts (columns)"
    about = f"{title}: gates of {len(usage.layers)} layers (rows) by {columns}"
    return Chart(title, about, width, height, "".join(parts), is_fixed=True)


def usage_key() -> str:
    """Return what the colours of a usage map mean, as a list of a page."""
    words = (("a quarter or less", -FULL), ("half", -1), ("equal share", 0), ("twice", 1), ("four times or more", FULL))
    lines = (
        f'<li><svg class="fixed" style="display:inline-block;vertical-align:-2px" width="13" height="13" '
        f'viewBox="0 0 13 13" aria-hidden="true">{_cell(0, 0, (13, 13), 2.0**power, "")}</svg> {word}</li>'
        for word, power in words
    )
    return f'<ul class="key">{"".join(lines)}</ul>'


def scatter(title: str, dots: Sequence[Dot], axes: tuple[str, str]) -> Chart:
    """Return dots in a square with equal scales; a mark tells a colour's number where there is room."""
    reach = max((max(abs(dot.x), abs(dot.y)) for dot in dots), default=1) or 1
    scale = (SIDE / 2 - EDGE) / reach
    middle = SIDE / 2
    parts = [
        f'<line x1="{EDGE / 2}" x2="{SIDE - EDGE / 2}" y1="{middle}" y2="{middle}" stroke="var(--grid)"/>',
        f'<line x1="{middle}" x2="{middle}" y1="{EDGE / 2}" y2="{SIDE - EDGE / 2}" stroke="var(--grid)"/>',
        text(SIDE - 4, SIDE - 4, axes[0], "tiny", "end"),
        text(4, 12, axes[1], "tiny"),
    ]
    has_marks = len(dots) <= 40
    radius = 4
    if has_marks:
        radius = 7
    for dot in dots:
        x, y = middle + scale * dot.x, middle - scale * dot.y
        look = f'r="{radius}" fill="{colour(dot.number)}" fill-opacity=".85"'
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" {look}><title>{escape(dot.name)}</title></circle>')
        if has_marks:
            parts.append(f'<text class="mark" x="{x:.1f}" y="{y + 3.5:.1f}">{dot.number}</text>')
    return Chart(title, f"{title}: {len(dots)} experts on two axes", SIDE, SIDE, "".join(parts))


def _cell(x: float, y: float, size: tuple[int, int], share: float, where: str) -> str:
    """Return one cell; `share` is relative to an equal one, `where` an element inside."""
    wide, tall = size
    # Powers of two: half and twice an equal share are as far from it.
    power = -FULL
    if share > 0:
        power = max(-FULL, min(FULL, math.log2(share)))
    tint = "var(--hot)" if power > 0 else "var(--cold)"
    strength = abs(power) / FULL
    corner = 2 if wide > 9 else 1
    box = f'x="{x}" y="{y}" width="{wide - 1}" height="{tall - 1}" rx="{corner}"'
    return f'<rect {box} fill="var(--grid)"/><rect {box} fill="{tint}" fill-opacity="{strength:.2f}">{where}</rect>'


def _fitted(words: str, width: float) -> str:
    most = max(2, int(width / 5.6))
    if len(words) <= most:
        return words
    return words[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"


__all__ = ["Dot", "Usage", "scatter", "usage_key", "usage_map"]
