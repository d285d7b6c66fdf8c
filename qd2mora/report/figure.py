"""A figure: charts side by side in one picture, written as PNG for slides and chats. Needs the extra `figures`.

The charts are those of a run's page. A PNG is their SVG rendered by resvg, whose wheels bring all but the fonts.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path

from qd2mora.disk.durable import write_bytes_atomically
from qd2mora.errors import InputRefused
from qd2mora.report.chart import Chart, KeyEntry, text
from qd2mora.report.page import DRAWING_STYLE, colour, in_light
from qd2mora.safekeeping.inventory import noted
from qd2mora.safekeeping.places import check_file

MARGIN, GUTTER = 20, 28
HEADING, LINE = 24, 20
LETTER = 8.0
"""Width of a letter of a key, about."""
NAMESPACE = 'xmlns="http://www.w3.org/2000/svg"'
ZOOM = 2.0
FONTS = '"Segoe UI", "Helvetica Neue", Arial, "Liberation Sans", "DejaVu Sans", "Noto Sans", Roboto, sans-serif'
"""The renderer drops what it has no font for, so that fonts of every system are named."""


def figure_svg(title: str, charts: Sequence[Chart], columns: int = 1) -> str:
    """Return charts in rows of `columns` as one SVG that stands by itself, in the page's light colours."""
    wide = max(chart.width for chart in charts)
    drawn, y = [text(MARGIN, MARGIN + 14, title, "strong")], MARGIN + 34.0
    for start in range(0, len(charts), columns):
        row = charts[start : start + columns]
        for column, chart in enumerate(row):
            x = MARGIN + column * (wide + GUTTER)
            drawn.append(f'<g transform="translate({x} {y})">{_with_heading_and_key(chart)}</g>')
        y += max(_height(chart) for chart in row) + GUTTER
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
    check_file(out, "--png", b"\x89PNG", "a picture")


def can_render() -> bool:
    """Tell whether the renderer is installed."""
    return importlib.util.find_spec("resvg_py") is not None


def write_png(svg: str, out: Path) -> None:
    """Render a figure and write it. Raises InputRefused where no font is installed that words could be drawn in."""
    letter = f'<svg {NAMESPACE} width="9" height="9"><text y="9" font-family=\'{FONTS}\'>W</text></svg>'
    if _rendered(letter) == _rendered(letter.replace("W", "")):
        raise InputRefused("--png: no font is installed here to write with; install one, such as DejaVu Sans")
    with noted(out):
        write_bytes_atomically(out, _rendered(svg))


def _rendered(svg: str) -> bytes:
    # An optional library: everything but a PNG does without it.
    from resvg_py import svg_to_bytes

    return svg_to_bytes(svg_string=svg, zoom=ZOOM)


def _with_heading_and_key(chart: Chart) -> str:
    drawing = chart.drawing or text(chart.width / 2, chart.height / 2, "no numbers", anchor="middle")
    parts = [text(0, 14, chart.title, "strong"), f'<g transform="translate(0 {HEADING})">{drawing}</g>']
    for x, line, entry in _placed_key(chart):
        y = HEADING + chart.height + line * LINE + 16
        parts.append(f'<rect x="{x}" y="{y - 5}" width="12" height="10" rx="2" fill="{colour(entry.number)}"/>')
        parts.append(text(x + 18, y + 4, f"{entry.name} {entry.value}"))
    return "".join(parts)


def _height(chart: Chart) -> float:
    num_lines = 1 + max((line for _, line, _ in _placed_key(chart)), default=-1)
    return HEADING + chart.height + num_lines * LINE + 6


def _placed_key(chart: Chart) -> Iterator[tuple[float, int, KeyEntry]]:
    """Yield where each entry of a key stands: x and line, as many in a line as fit the chart's width."""
    x, line = 0.0, 0
    for entry in chart.key:
        width = 32 + LETTER * len(f"{entry.name} {entry.value}")
        if x > 0 and x + width > chart.width:
            x, line = 0.0, line + 1
        yield x, line, entry
        x += width


__all__ = ["can_render", "check_png", "figure_svg", "write_png"]
