"""A figure: charts side by side in one picture, written as PNG for slides and chats. Needs the extra `figures`.

The charts are those of a run's page. A PNG is their SVG rendered by resvg, whose wheels bring all but the fonts.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qd2mora.disk.durable import write_file
from qd2mora.errors import InputRefused
from qd2mora.report.chart import Chart, KeyEntry, text
from qd2mora.report.page import DRAWING_STYLE, colour, in_light

MARGIN, GUTTER = 20, 28
HEADING, LINE = 24, 20
LETTER = 8.0
"""Width of a letter of a key, about."""
NAMESPACE = 'xmlns="http://www.w3.org/2000/svg"'
ZOOM = 2.0
FONTS = '"Segoe UI", "Helvetica Neue", Arial, "Liberation Sans", "DejaVu Sans", "Noto Sans", Roboto, sans-serif'
"""The renderer drops what it has no font for, so that fonts of every system are named."""


@dataclass(frozen=True)
class Panel:
    """A part of a figure: a chart under its heading, with its key below."""

    heading: str
    chart: Chart


def figure_svg(title: str, panels: Sequence[Panel], columns: int = 1) -> str:
    """Return panels in rows of `columns` as one SVG that stands by itself, in the page's light colours."""
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    wide = max(panel.chart.width for panel in panels)
    drawn, y = [text(MARGIN, MARGIN + 14, title, "strong")], MARGIN + 34.0
    for row in rows:
        for column, panel in enumerate(row):
            drawn.append(_panel(panel, MARGIN + column * (wide + GUTTER), y))
        y += max(_height(panel) for panel in row) + GUTTER
    width = 2 * MARGIN + columns * wide + (columns - 1) * GUTTER
    style = DRAWING_STYLE.replace('system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif', FONTS)
    style += " svg text.strong { font-size: 14px; font-weight: 700; fill: var(--ink); }"
    return in_light(
        f'<svg {NAMESPACE} viewBox="0 0 {width} {y}" width="{width}" height="{y}">'
        f'<style>{style}</style><rect width="{width}" height="{y}" fill="var(--card)"/>{"".join(drawn)}</svg>'
    )


def check_png(out: Path) -> None:
    """Refuse what no picture can be written to. Raises InputRefused."""
    if not can_render():
        raise InputRefused("--png: resvg-py is not installed; pip install 'qd2mora[figures]'")
    if out.suffix != ".png" or out.is_dir() or not out.parent.is_dir():
        raise InputRefused(f"--png: '{out}' will not do: name a .png file in a folder that is there")


def can_render() -> bool:
    """Tell whether the renderer is installed."""
    return importlib.util.find_spec("resvg_py") is not None


def write_png(svg: str, out: Path) -> None:
    """Render a figure and write it. Raises InputRefused where no font is installed that words could be drawn in."""
    letter = f'<svg {NAMESPACE} width="9" height="9"><text y="9" font-family=\'{FONTS}\'>W</text></svg>'
    if _rendered(letter) == _rendered(letter.replace("W", "")):
        raise InputRefused("--png: no font is installed here to write with; install one, such as DejaVu Sans")
    write_file(out, [_rendered(svg)])


def _rendered(svg: str) -> bytes:
    # An optional library: everything but a PNG does without it.
    from resvg_py import svg_to_bytes

    return svg_to_bytes(svg_string=svg, zoom=ZOOM)


def _panel(panel: Panel, x: float, y: float) -> str:
    chart = panel.chart
    drawing = chart.drawing or text(chart.width / 2, chart.height / 2, "no numbers", anchor="middle")
    drawn = text(0, 14, panel.heading, "strong") + f'<g transform="translate(0 {HEADING})">{drawing}</g>'
    for line, entries in enumerate(_key_lines(chart)):
        at, middle = 0.0, HEADING + chart.height + (line + 0.5) * LINE + 6
        for entry in entries:
            drawn += (
                f'<rect x="{at:.1f}" y="{middle - 5:.1f}" width="12" height="10" rx="2" fill="{colour(entry.number)}"/>'
            )
            drawn += text(round(at + 18, 1), round(middle + 4, 1), _words(entry))
            at += _width(entry)
    return f'<g transform="translate({x} {y})">{drawn}</g>'


def _height(panel: Panel) -> float:
    return HEADING + panel.chart.height + LINE * len(_key_lines(panel.chart)) + 6


def _key_lines(chart: Chart) -> list[list[KeyEntry]]:
    """Share a key out among lines that fit the chart's width."""
    lines: list[list[KeyEntry]] = []
    room = 0.0
    for entry in chart.key:
        if _width(entry) > room:
            lines.append([])
            room = chart.width
        lines[-1].append(entry)
        room -= _width(entry)
    return lines


def _width(entry: KeyEntry) -> float:
    return 32 + LETTER * len(_words(entry))


def _words(entry: KeyEntry) -> str:
    return f"{entry.name} {entry.value}".strip()


__all__ = ["Panel", "can_render", "check_png", "figure_svg", "write_png"]
