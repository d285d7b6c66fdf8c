"""One self-contained HTML page: no script, no network, light and dark, narrow and wide, on paper.

Every text from a run goes through `escape`; the page's own policy forbids whatever could slip through to run or load.
"""

import re
from collections.abc import Iterable, Sequence
from html import escape as _escape

NUM_COLOURS = 8
_LIGHT = ("#2457d6", "#c2620a", "#0b7f5c", "#c0266f", "#6f3fd6", "#0a7f9c", "#5f7d0c", "#c42b2b")
_DARK = ("#7aa7ff", "#f5a94b", "#45cf9f", "#f583b4", "#b59bff", "#4fd0ea", "#b5d84a", "#ff8a80")

DRAWING_STYLE = """
svg text { fill: var(--soft); font: 13px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; }
svg text.tiny { font-size: 10px; }
svg text.mark { font-size: 10px; font-weight: 700; text-anchor: middle; fill: var(--card); }
""".strip()

_STYLE = """
:root { color-scheme: light dark; --paper: #f6f7f9; --card: #ffffff; --ink: #1b1f27; --soft: #5b6472; --line: #dfe3e9;
  --grid: #e8ebf0; --hot: #d9480f; --cold: #2457d6; --warn-card: #fff4e5; --warn-ink: #7a3e00; --warn-line: #f0b268;
  LIGHT }
@media (prefers-color-scheme: dark) { :root { --paper: #12151b; --card: #1b1f27; --ink: #e8ebf0; --soft: #9aa4b2;
  --line: #303642; --grid: #2a303b; --hot: #ff9152; --cold: #7aa7ff; --warn-card: #33240f; --warn-ink: #ffcf94;
  --warn-line: #8a5a1c; DARK } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; }
main, header { max-width: 1180px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 28px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 40px 0 4px; padding-top: 8px; }
h3 { font-size: 14px; margin: 0 0 8px; font-weight: 650; }
p { margin: 4px 0 12px; max-width: 76ch; color: var(--soft); }
nav { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 12px 0 4px; font-size: 14px; }
a { color: var(--c1); text-decoration: none; } a:hover { text-decoration: underline; }
.grid { display: grid; gap: 16px; margin: 14px 0;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); }
.small { grid-template-columns: repeat(auto-fill, minmax(min(100%, 250px), 1fr)); }
.tiles { grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); margin: 16px 0; gap: 12px; }
.card, .tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px;
  min-width: 0; break-inside: avoid; }
.card > p { font-size: 13px; margin: 6px 0 0; } section > .card { margin-top: 14px; }
.tile b { display: block; white-space: nowrap; font-size: 21px;
  line-height: 1.25; font-weight: 650; font-variant-numeric: tabular-nums; }
.tile span { font-size: 13px; color: var(--soft); }
.warn { background: var(--warn-card); color: var(--warn-ink); border: 1px solid var(--warn-line); border-radius: 10px;
  padding: 10px 14px; margin: 14px 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
svg { display: block; width: 100%; height: auto; } svg.fixed { width: auto; max-width: none; }
DRAWING
.key { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 13px; margin: 8px 0 0; padding: 0; list-style: none; }
.key i { display: inline-block; width: 14px; height: 3px; border-radius: 2px; margin-right: 6px;
  vertical-align: middle; }
.key i.box { height: 12px; width: 12px; border-radius: 3px; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: 5px 10px; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; color: var(--soft); } th:first-child, td:first-child { text-align: left; padding-left: 0; }
td.left, th.left { text-align: left; } td:first-child { overflow-wrap: break-word; }
tr.sum td { font-weight: 650; border-bottom: 0; } tr:last-child td { border-bottom: 0; }
td small { color: var(--soft); white-space: nowrap; } td.heat { position: relative; }
.bar { display: block; height: 10px; border-radius: 3px; background: var(--c1); min-width: 2px; }
.bar.other { background: var(--c2); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 16px; margin: 0; font-size: 14px; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 0 8px; font: 13px/1.45 ui-monospace, Menlo, Consolas,
  monospace; background: var(--paper); border-radius: 6px; padding: 8px 10px; }
details { margin: 12px 0; } summary { cursor: pointer; color: var(--soft); font-size: 14px; }
footer { color: var(--soft); font-size: 13px; margin: 40px 0 28px; }
@media (max-width: 600px) { main, header { padding: 0 12px; } header { padding-top: 18px; } .card { padding: 12px; }
  .tile b { font-size: 19px; } dl { gap: 3px 12px; } dt { max-width: 42vw; }
  table { font-size: 13px; } th, td { padding: 5px 6px; } td:first-child { overflow-wrap: anywhere; min-width: 84px; } }
@media print { body { background: #fff; } main, header { max-width: none; } nav { display: none; }
  h2 { break-after: avoid; } .wide { overflow: visible; } }
"""

# Text of a run or a data set that got past `escape` could neither run nor load anything.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def escape(text: object) -> str:
    """Return text that is nothing but text in HTML, in an attribute too; control characters become a mark."""
    # Control characters could turn the direction of text, or be read by nobody but a browser.
    hidden = {each for each in str(text) if not each.isprintable() and each not in "\n\t"}
    plain = str(text).translate({ord(each): "\N{REPLACEMENT CHARACTER}" for each in hidden})
    return _escape(plain, quote=True)


def page(title: str, lead: str, sections: Sequence[tuple[str, str]], banner: str = "", footer: str = "") -> str:
    """Return the page. `title` and headings are text; `lead`, `banner`, `footer` and the sections' bodies are HTML."""
    nav = "".join(f'<a href="#s{number}">{escape(name)}</a>' for number, (name, _) in enumerate(sections))
    body = "".join(
        f'<section id="s{number}" aria-labelledby="h{number}"><h2 id="h{number}">{escape(name)}</h2>{html}</section>'
        for number, (name, html) in enumerate(sections)
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_style()}</style>\n</head>\n<body>\n"
        f"<header><h1>{escape(title)}</h1>{lead}{banner}<nav aria-label='sections'>{nav}</nav></header>\n"
        f"<main>{body}<footer>{footer}</footer></main>\n</body>\n</html>\n"
    )


def grid(cards: Iterable[str], kind: str = "") -> str:
    """Return cards side by side where there is room."""
    return f'<div class="grid {kind}">{"".join(cards)}</div>'


def card(heading: str, html: str, note: str = "") -> str:
    """Return a card; `heading` and `note` are text."""
    under = f"<p>{escape(note)}</p>" if note else ""
    return f'<div class="card"><h3>{escape(heading)}</h3><div class="wide">{html}</div>{under}</div>'


def tiles(numbers: Sequence[tuple[str, str]]) -> str:
    """Return the numbers that matter most, each with its name."""
    each = (f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for name, value in numbers)
    return f'<div class="grid tiles">{"".join(each)}</div>'


def facts(pairs: Iterable[tuple[str, object]]) -> str:
    """Return names with their values."""
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(value)}</dd>' for name, value in pairs)}</dl>"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], last_is_sum: bool = False) -> str:
    """Return a table; cells are HTML, so that text in them is escaped before."""
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    lines = [f"<tr><td>{'</td><td>'.join(row)}</td></tr>" for row in rows]
    if last_is_sum:
        lines[-1] = lines[-1].replace("<tr>", '<tr class="sum">', 1)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def paragraph(text: str) -> str:
    """Return a paragraph of text, bold where it is between backticks."""
    marked = re.sub("`([^`]+)`", r"<b>\1</b>", escape(text))
    return f"<p>{marked}</p>"


def folded(summary: str, html: str) -> str:
    """Return what is shown when asked for."""
    return (
        f'<details><summary>{escape(summary)}</summary><div class="card"><div class="wide">{html}</div></div></details>'
    )


def colour(number: int) -> str:
    """Return the colour of series `number`."""
    return f"var(--c{number % NUM_COLOURS + 1})"


def _style() -> str:
    light, dark = (
        " ".join(f"--c{number}: {value};" for number, value in enumerate(values, 1)) for values in (_LIGHT, _DARK)
    )
    return _STYLE.replace("DRAWING", DRAWING_STYLE).replace("LIGHT", light).replace("DARK", dark)


def in_light(svg: str) -> str:
    """Return a drawing with the colours of the light page in place of their names, for what knows no CSS variables."""
    colours = dict(re.findall(r"--([a-z0-9-]+): ([^;]+);", _style().partition("@media")[0]))
    return re.sub(r"var\(--([a-z0-9-]+)\)", lambda name: str(colours[name[1]]), svg)


__all__ = [
    "DRAWING_STYLE",
    "NUM_COLOURS",
    "card",
    "colour",
    "escape",
    "facts",
    "folded",
    "grid",
    "in_light",
    "page",
    "paragraph",
    "table",
    "tiles",
]
