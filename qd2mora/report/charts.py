"""Charts as inline SVG: lines, a heat map, points. Each has a name and a description for who cannot see it."""

import itertools
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qd2mora.report.page import NUM_COLOURS, colour, escape

WIDTH, HEIGHT = 480, 250
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 10, 40
MAP_WIDTH = 404
"""Fits the narrowest card of a row of two."""
MOST_POINTS = 300
FULL = 2.0
"""Powers of two away from an equal share at which a cell has its full colour."""

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
) -> str:
    """Return lines over a common x, with a key below; `low`, `high` widen the y axis; `is_log` if all is positive."""
    shown = [
        Series(each.name, thinned(_finite(each.points)), each.number, each.is_faint, each.has_dots) for each in series
    ]
    shown = [each for each in shown if each.points]
    if not shown:
        return "<p>no numbers</p>"
    xs, ys = ([point[axis] for each in shown for point in each.points] for axis in (0, 1))
    bounds = [*ys, *(bound for bound in (low, high) if bound is not None)]
    is_log = is_log and min(bounds) > 0 and max(bounds) / min(bounds) > 20
    y_ticks = _log_ticks(min(bounds), max(bounds)) if is_log else ticks(min(bounds), max(bounds))
    y_low, y_high = min(*bounds, y_ticks[0]), max(*bounds, y_ticks[-1])
    x_ticks = [tick for tick in ticks(min(xs), max(xs), 5) if min(xs) <= tick <= max(xs)]
    place_x, place_y = (
        _scale(min(xs), max(xs), LEFT, WIDTH - RIGHT),
        _scale(y_low, y_high, HEIGHT - BOTTOM, TOP, is_log),
    )
    parts = []
    for tick in y_ticks:
        y = place_y(tick)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--grid)"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    for tick in x_ticks:
        parts.append(f'<text x="{place_x(tick):.1f}" y="{HEIGHT - 20}" text-anchor="middle">{short(tick)}</text>')
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_name)}</text>'
    )
    for each in shown:
        parts.append(_line([(place_x(x), place_y(y)) for x, y in each.points], each))
    ends = ", ".join(f"{each.name} ends at {short(each.points[-1][1])}" for each in shown if not each.is_faint)
    return _svg(title, f"{title} by {x_name}: {ends}", WIDTH, HEIGHT, parts) + key(
        [(each.name, each.number, short(each.points[-1][1])) for each in shown if not each.is_faint]
    )


def key(entries: Sequence[tuple[str, int, str]], *, as_boxes: bool = False) -> str:
    """Return which colour is what: name, number of the colour, and a value or nothing."""
    kind = ' class="box"' if as_boxes else ""
    each = (
        f'<li><i{kind} style="background:{colour(number)}"></i>{escape(name)}'
        + (f" <b>{escape(value)}</b></li>" if value else "</li>")
        for name, number, value in entries
    )
    return f'<ul class="key">{"".join(each)}</ul>'


def usage_map(
    title: str, layers: Sequence[int], tasks: Sequence[str], usage: Sequence[Sequence[Sequence[float] | None]]
) -> str:
    """Return a heat map of gates: one row a layer, one group of columns a task, one column an expert.

    usage: layer, task, expert; None where a task has none. Colours tell how far a gate is from an equal share, on a
    scale of powers of two.
    """
    widest = max((len(row) for by_task in usage for row in by_task if row), default=1)
    gap, left, top, tall = 6, 30, 20, 16
    cell = max(6, min(26, int((MAP_WIDTH - left - len(tasks) * gap) / (len(tasks) * widest))))
    group = widest * cell + gap
    width, height = left + len(tasks) * group, top + len(layers) * tall + 16
    parts = []
    for number, task in enumerate(tasks):
        x = left + number * group
        parts.append(
            f'<text class="tiny" x="{x}" y="{top - 7}">{escape(_fitted(task, group - gap))}'
            f"<title>{escape(task)}</title></text>"
        )
        if cell >= 12:
            parts += [
                f'<text class="tiny" x="{x + (e + 0.5) * cell}" y="{height - 3}" text-anchor="middle">{e}</text>'
                for e in range(widest)
            ]
    for row, layer in enumerate(layers):
        y = top + row * tall
        if len(layers) <= 16 or layer % 4 == 0:
            parts.append(f'<text class="tiny" x="{left - 6}" y="{y + tall - 4}" text-anchor="end">{layer}</text>')
        for number, task in enumerate(tasks):
            shares = usage[row][number]
            for expert, share in enumerate(shares or ()):
                where = f"layer {layer}, {task}, expert {expert}: {share:.1%}"
                x = left + number * group + expert * cell
                parts.append(_cell(x, y, cell, tall, share * len(shares or ()), where))
    about = f"{title}: gates of {len(layers)} layers (rows) by {len(tasks)} tasks and {widest} experts (columns)"
    return _svg(title, about, width, height, parts, is_fixed=True)


def usage_key() -> str:
    """Return what the colours of a usage map mean."""
    words = (("a quarter or less", -FULL), ("half", -1), ("equal share", 0), ("twice", 1), ("four times or more", FULL))
    each = (
        f'<li><svg class="fixed" style="display:inline-block;vertical-align:-2px" width="13" height="13" '
        f'viewBox="0 0 13 13" aria-hidden="true">{_cell(0, 0, 13, 13, 2.0**power, "")}</svg> {word}</li>'
        for word, power in words
    )
    return f'<ul class="key">{"".join(each)}</ul>'


def scatter(title: str, points: Sequence[tuple[float, float, int, str]], axes: Sequence[str]) -> str:
    """Return points (x, y, colour, name) in a square with equal scales; a mark tells its colour's number."""
    size, edge = 250, 20
    reach = max((max(abs(x), abs(y)) for x, y, _, _ in points), default=1) or 1
    scale = (size / 2 - edge) / reach
    middle = size / 2
    parts = [
        f'<line x1="{edge / 2}" x2="{size - edge / 2}" y1="{middle}" y2="{middle}" stroke="var(--grid)"/>',
        f'<line x1="{middle}" x2="{middle}" y1="{edge / 2}" y2="{size - edge / 2}" stroke="var(--grid)"/>',
        f'<text class="tiny" x="{size - 4}" y="{size - 4}" text-anchor="end">{escape(axes[0])}</text>',
        f'<text class="tiny" x="4" y="12">{escape(axes[1])}</text>',
    ]
    radius = 7 if len(points) <= 40 else 4
    for x, y, number, name in points:
        at_x, at_y = middle + scale * x, middle - scale * y
        told = f"<title>{escape(name)}</title>"
        look = f'r="{radius}" fill="{colour(number)}" fill-opacity=".85"'
        parts.append(f'<circle cx="{at_x:.1f}" cy="{at_y:.1f}" {look}>{told}</circle>')
        if radius == 7:
            parts.append(f'<text class="mark" x="{at_x:.1f}" y="{at_y + 3.5:.1f}">{number}</text>')
    return _svg(title, f"{title}: {len(points)} experts on two axes", size, size, parts)


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """Return at most `most` points, each the mean of its neighbours."""
    if len(points) <= most:
        return list(points)
    edges = [number * len(points) // most for number in range(most + 1)]
    parts = [points[start:stop] for start, stop in itertools.pairwise(edges)]
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts]


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Return the mean over neighbours on both sides, about a thirtieth of all points, fewer towards the ends."""
    there = _finite(points)
    sums = [0.0, *itertools.accumulate(y for _, y in there)]
    found = []
    for place, (x, _) in enumerate(there):
        half = min(len(there) // 60, place, len(there) - 1 - place)
        found.append((x, (sums[place + half + 1] - sums[place - half]) / (2 * half + 1)))
    return found


def ticks(low: float, high: float, number: int = 4) -> list[float]:
    """Return round numbers that cover low to high."""
    if not high > low:
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if low else (0.0, 1.0)
    rough = (high - low) / number
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [place * step for place in range(first, last + 1)]


def short(number: float) -> str:
    """Return a number in few characters."""
    size = abs(number)
    if size >= 1e6 or 0 < size < 1e-3:
        return f"{number:.1e}".replace(".0e", "e").replace("e-0", "e-").replace("e+0", "e")
    if size >= 1e4:
        return f"{number / 1e3:g}k" if number % 100 == 0 else f"{number / 1e3:.1f}k"
    return f"{number:.4g}" if size >= 1 or number == 0 else f"{number:.3g}"


def _log_ticks(low: float, high: float) -> list[float]:
    """Return a few round numbers within low to high, which is a factor of 20 at least."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [factor * 10.0**power for power in powers for factor in factors]
        found = [tick for tick in found if low <= tick <= high]
        if len(found) <= 6:
            return found
    return found[:: -(-len(found) // 6)]


def _scale(low: float, high: float, start: float, stop: float, is_log: bool = False) -> Callable[[float], float]:
    if is_log:
        low, high = math.log10(low), math.log10(high)
    span = (high - low) or 1.0

    def place(value: float) -> float:
        return start + (stop - start) * ((math.log10(value) if is_log else value) - low) / span

    return place


def _line(places: Sequence[Point], series: Series) -> str:
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    dash = ' stroke-dasharray="6 4"' if series.number >= NUM_COLOURS else ""
    look = 'stroke-opacity=".28" stroke-width="1"' if series.is_faint else 'stroke-width="2"'
    drawn = f'<path d="{path}" fill="none" stroke="{colour(series.number)}" stroke-linejoin="round" {look}{dash}/>'
    if series.has_dots or len(places) == 1:
        drawn += "".join(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour(series.number)}"/>' for x, y in places
        )
    return drawn


def _cell(x: float, y: float, wide: int, tall: int, share: float, where: str) -> str:
    """Return one cell; `share` is relative to an equal one."""
    power = max(-FULL, min(FULL, math.log2(share))) if share > 0 else -FULL
    tint, strength = ("var(--hot)" if power > 0 else "var(--cold)"), abs(power) / FULL
    told = f"<title>{escape(where)}</title>" if where else ""
    box = f'x="{x}" y="{y}" width="{wide - 1}" height="{tall - 1}" rx="{2 if wide > 9 else 1}"'
    return f'<rect {box} fill="var(--grid)"/><rect {box} fill="{tint}" fill-opacity="{strength:.2f}">{told}</rect>'


def _fitted(text: str, width: float) -> str:
    most = max(2, int(width / 5.6))
    return text if len(text) <= most else text[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _finite(points: Sequence[Point]) -> list[Point]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _svg(title: str, about: str, width: float, height: float, parts: Sequence[str], *, is_fixed: bool = False) -> str:
    number = zlib.crc32(f"{title}|{about}".encode())
    size = f' class="fixed" width="{width}" height="{height}"' if is_fixed else ""
    return (
        f'<svg role="img" aria-labelledby="t{number} d{number}" viewBox="0 0 {width} {height}"{size}>'
        f'<title id="t{number}">{escape(title)}</title><desc id="d{number}">{escape(about)}</desc>'
        f"{''.join(parts)}</svg>"
    )


__all__ = ["Series", "key", "line_chart", "scatter", "short", "smoothed", "thinned", "ticks", "usage_key", "usage_map"]
