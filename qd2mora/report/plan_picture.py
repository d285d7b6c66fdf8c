"""A plan in one PNG: a bar for each item of the ledger, at the peak, at other moments, and on the host."""

from pathlib import Path
from typing import Any

from qd2mora.memory import Plan
from qd2mora.report.picture import figure_for

GIB = 1 << 30
COLOURS = {"at the peak": "tab:blue", "at another moment": "lightsteelblue", "host memory": "silver"}


def draw_plan(planned: Plan, out: Path) -> None:
    """Write the picture. Raises InputRefused where matplotlib or the folder is missing."""
    groups = dict(zip(COLOURS, (planned.items, planned.elsewhere, planned.host), strict=True))
    bars = [(name, size / GIB, kind) for kind, items in groups.items() for name, size in items.items()]
    figure = figure_for(out, (10, 1.5 + 0.32 * len(bars)))
    ax: Any = figure.subplots()
    for place, (_, size, kind) in enumerate(bars):
        ax.barh(place, size, color=COLOURS[kind], label=kind if bars[place - 1][2] != kind or place == 0 else None)
        ax.text(size, place, f" {size:.2f}", va="center", fontsize=8)
    ax.set_yticks(range(len(bars)), [name for name, _, _ in bars])
    ax.invert_yaxis()
    ax.set_xlabel("GiB")
    budget = "no budget" if planned.budget_bytes is None else f"budget {planned.budget_bytes / GIB:.2f} GiB"
    ax.set_title(f"planned peak {planned.peak_bytes / GIB:.2f} GiB, {budget}", fontsize=11)
    ax.legend(fontsize=8)
    figure.savefig(out, dpi=110)


__all__ = ["draw_plan"]
