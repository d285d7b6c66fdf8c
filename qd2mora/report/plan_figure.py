"""A plan in one picture: a bar for each item of the ledger, at the peak, at other moments, and on the host."""

from pathlib import Path

from qd2mora.memory import Plan
from qd2mora.report.bars import Span, span_chart
from qd2mora.report.chart import KeyEntry
from qd2mora.report.figure import check_png, figure_svg, write_png

GIB = 1 << 30


def draw_plan(planned: Plan, out: Path) -> None:
    """Write the picture. Raises InputRefused where the renderer or the folder is missing."""
    check_png(out)
    groups = {"at the peak": planned.items, "at another moment": planned.elsewhere, "host memory": planned.host}
    bars = [
        Span(name, 0.0, size / GIB, number, f"{size / GIB:.2f}")
        for number, items in enumerate(groups.values())
        for name, size in items.items()
    ]
    key = tuple(KeyEntry(name, number) for number, (name, items) in enumerate(groups.items()) if items)
    budget = "no budget"
    if planned.budget_bytes is not None:
        budget = f"budget {planned.budget_bytes / GIB:.2f} GiB"
    title = f"planned peak {planned.peak_bytes / GIB:.2f} GiB, {budget}"
    write_png(figure_svg(title, [span_chart("what is alive", bars, "GiB", key)]), out)


__all__ = ["draw_plan"]
