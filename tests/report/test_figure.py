"""Figures: charts of the page as one picture that stands by itself."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from qd2mora.errors import InputRefused
from qd2mora.report import figure
from qd2mora.report.bars import Span, span_chart
from qd2mora.report.chart import Chart, KeyEntry
from qd2mora.report.curves import Series, line_chart
from qd2mora.report.figure import check_png, figure_svg, write_png

HOSTILE = "</text><script>alert(1)</script>"


def charts() -> list[Chart]:
    lines = [Series(f"task {number} {HOSTILE}", [(0, 2.0), (9, 1.0 + number)], number) for number in range(6)]
    spans = [Span("d2mora", 1.0, 2.0, 0, middle=1.4), Span("d2mora", 1.2, 2.2, 1, middle=1.5), Span("lora", 0, 3, 0)]
    return [line_chart(HOSTILE, lines), span_chart("spans", spans, "nats", (KeyEntry("as trained", 0),))]


def test_a_figure_is_whole_and_names_its_colours() -> None:
    svg = figure_svg(HOSTILE, charts(), columns=2)
    tree = ElementTree.fromstring(svg)
    assert "var(" not in svg and not tree.findall(".//{*}script")
    assert "".join(tree.itertext()).count(HOSTILE) == 2 + 6  # the figure's, the chart's, and the tasks' names
    assert "no numbers" in figure_svg("empty", [line_chart("nothing", [])])


def test_nothing_of_a_figure_lies_outside_and_keys_do_not_overlap() -> None:
    tree = ElementTree.fromstring(figure_svg("figure", charts(), columns=2))
    width, height = float(tree.attrib["width"]), float(tree.attrib["height"])
    for panel in tree.findall("{*}g"):
        x, y = map(float, re.findall(r"[\d.]+", panel.attrib["transform"]))
        boxes = [tuple(float(box.attrib[name]) for name in ("x", "y")) for box in panel.findall("{*}rect")]
        assert len(set(boxes)) == len(boxes)
        assert all(x + left < width and y + top < height for left, top in boxes)


def test_what_cannot_be_drawn_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figure, "_rendered", lambda svg: b"blank")
    with pytest.raises(InputRefused, match="no font is installed"):
        write_png("<svg/>", tmp_path / "out.png")
    monkeypatch.setattr(figure, "can_render", lambda: False)
    with pytest.raises(InputRefused, match=r"--png: resvg-py is not installed; pip install 'qd2mora\[figures\]'"):
        check_png(tmp_path / "out.png")
    assert not list(tmp_path.iterdir())
