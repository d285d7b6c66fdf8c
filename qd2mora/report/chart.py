"""A chart: a drawing as SVG with a name, a description for who cannot see it, and which colour is what.

The page of a run holds charts as HTML, `figure` sets several in one picture of its own.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from qd2mora.report.page import colour, escape


@dataclass(frozen=True)
class KeyEntry:
    """What has a colour: its name, the colour's number, and a value or nothing."""

    name: str
    number: int
    value: str = ""


@dataclass(frozen=True)
class Chart:
    """A drawing of `width` x `height`. `is_fixed`: it keeps its size on a page, others fill the width of their card."""

    title: str
    about: str
    width: float
    height: float
    drawing: str
    key: tuple[KeyEntry, ...] = ()
    is_fixed: bool = False

    def html(self) -> str:
        """Return the drawing and its key as parts of a page."""
        if not self.drawing:
            return "<p>no numbers</p>"
        # Ids that differ within a page, and are the same whenever it is written.
        number = zlib.crc32(f"{self.title}|{self.about}".encode())
        size = ""
        if self.is_fixed:
            size = f' class="fixed" width="{self.width}" height="{self.height}"'
        drawn = (
            f'<svg role="img" aria-labelledby="t{number} d{number}" viewBox="0 0 {self.width} {self.height}"{size}>'
            f'<title id="t{number}">{escape(self.title)}</title><desc id="d{number}">{escape(self.about)}</desc>'
            f"{self.drawing}</svg>"
        )
        if not self.key:
            return drawn
        return drawn + key_html(self.key)


def key_html(entries: Sequence[KeyEntry], *, as_boxes: bool = False) -> str:
    """Return a key as a list of a page."""
    kind = ' class="box"' if as_boxes else ""
    lines = []
    for entry in entries:
        value = f" <b>{escape(entry.value)}</b>" if entry.value else ""
        lines.append(f'<li><i{kind} style="background:{colour(entry.number)}"></i>{escape(entry.name)}{value}</li>')
    return f'<ul class="key">{"".join(lines)}</ul>'


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "") -> str:
    """Return words at a place; `kind`: tiny, mark, strong or as usual; `anchor`: where x is, its start by default."""
    look = ""
    if kind:
        look += f' class="{kind}"'
    look += f' x="{x}" y="{y}"'
    if anchor:
        look += f' text-anchor="{anchor}"'
    return f"<text{look}>{escape(words)}</text>"


def grid_line(x1: float, y1: float, x2: float, y2: float) -> str:
    """Return a faint line."""
    return f'<line x1="{x1}" x2="{x2}" y1="{y1}" y2="{y2}" stroke="var(--grid)"/>'


def short(number: float) -> str:
    """Return a number in few characters."""
    size = abs(number)
    if size >= 1e6 or 0 < size < 1e-3:
        return f"{number:.1e}".replace(".0e", "e").replace("e-0", "e-").replace("e+0", "e")
    if size >= 1e4:
        if number % 100 == 0:
            return f"{number / 1e3:g}k"
        return f"{number / 1e3:.1f}k"
    if size >= 1 or number == 0:
        return f"{number:.4g}"
    return f"{number:.3g}"


__all__ = ["Chart", "KeyEntry", "grid_line", "key_html", "short", "text"]
