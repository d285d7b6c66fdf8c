"""Curves over a common axis as a chart: training losses, scores by step, measures by layer."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qd2mora.report.chart import Chart, KeyEntry, short, text
from qd2mora.report.page import NUM_COLOURS, colour
from qd2mora.report.scales import Scale, log_ticks, ticks

WIDTH, HEIGHT = 480, 250
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 10, 40
MOST_POINTS = 300

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A line: its name, its points in order, and how it is drawn."""

    name: str
    points: Sequence[Point]
    number: int = 0
    is_faint: bool = False
    has_dots: bool = False


def line_chart(
    title: str,
    series: Sequence[Series],
    x_name: str = "step",
    *,
    low: float | None = None,
    high: float | None = None,
    is_log: bool = False,
) -> Chart:
    """Return lines over a common x, with a key; `low`, `high` widen the y axis; `is_log` if all is positive."""
    shown = [replace(each, points=thinned(_finite(each.points))) for each in series]
    shown = [each for each in shown if each.points]
    if not shown:
        return Chart(title, "no numbers", WIDTH, HEIGHT, "")
    xs, ys = ([point[axis] for each in shown for point in each.points] for axis in (0, 1))
    bounds = [*ys, *(bound for bound in (low, high) if bound is not None)]
    # A logarithm that spans less than a factor of 20 hides more than it shows.
    is_log = is_log and min(bounds) > 0 and max(bounds) / min(bounds) > 20
    y_ticks = log_ticks(min(bounds), max(bounds)) if is_log else ticks(min(bounds), max(bounds))
    x_ticks = [tick for tick in ticks(min(xs), max(xs), 5) if min(xs) <= tick <= max(xs)]
    x_scale = Scale(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    y_scale = Scale(min(*bounds, y_ticks[0]), max(*bounds, y_ticks[-1]), HEIGHT - BOTTOM, TOP, is_log)
    drawing = _axes(x_scale, x_ticks, x_name, y_scale, y_ticks)
    if is_log:
        drawing += text(LEFT, HEIGHT - 4, "logarithmic axis", "tiny")
    for each in shown:
        drawing += _line([(x_scale.place(x), y_scale.place(y)) for x, y in each.points], each)
    named = [each for each in shown if not each.is_faint]
    axis = "; logarithmic axis" if is_log else ""
    ends = ", ".join(f"{each.name} ends at {short(each.points[-1][1])}" for each in named)
    key = tuple(KeyEntry(each.name, each.number, short(each.points[-1][1])) for each in named)
    return Chart(title, f"{title} by {x_name}: {ends}{axis}", WIDTH, HEIGHT, drawing, key)


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """Return at most `most` points, each the mean of its neighbours."""
    if len(points) <= most:
        return list(points)
    # Means of neighbours, not every n-th point: a spike is lowered but seen.
    edges = [number * len(points) // most for number in range(most + 1)]
    parts = [points[start:stop] for start, stop in itertools.pairwise(edges)]
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts]


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Return the mean over neighbours on both sides, about a thirtieth of all points, fewer towards the ends."""
    there = _finite(points)
    sums = [0.0, *itertools.accumulate(y for _, y in there)]
    found = []
    for place, (x, _) in enumerate(there):
        # As many on either side, so that a falling loss is not shown late.
        half = min(len(there) // 60, place, len(there) - 1 - place)
        found.append((x, (sums[place + half + 1] - sums[place - half]) / (2 * half + 1)))
    return found


def _axes(x_scale: Scale, x_ticks: list[float], x_name: str, y_scale: Scale, y_ticks: list[float]) -> str:
    parts = []
    for tick in y_ticks:
        y = y_scale.place(tick)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--grid)"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    for tick in x_ticks:
        parts.append(f'<text x="{x_scale.place(tick):.1f}" y="{HEIGHT - 20}" text-anchor="middle">{short(tick)}</text>')
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, x_name, anchor="middle"))
    return "".join(parts)


def _line(places: Sequence[Point], series: Series) -> str:
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    dash = ' stroke-dasharray="6 4"' if series.number >= NUM_COLOURS else ""
    look = 'stroke-opacity=".28" stroke-width="1"' if series.is_faint else 'stroke-width="2"'
    drawn = f'<path d="{path}" fill="none" stroke="{colour(series.number)}" stroke-linejoin="round" {look}{dash}/>'
    if series.has_dots or len(places) == 1:
        for x, y in places:
            drawn += f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour(series.number)}"/>'
    return drawn


def _finite(points: Sequence[Point]) -> list[Point]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


__all__ = ["Point", "Series", "line_chart", "smoothed", "thinned"]
