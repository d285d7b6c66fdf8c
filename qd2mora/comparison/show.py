"""A comparison for people: a table on the terminal, the same in Markdown, and a picture (the extra `figures`)."""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qd2mora.comparison.outcome import STAGES, Comparison, verdicts

_HEADINGS = {"trained": "as trained", "export": "best static export"}


def show(found: Comparison, console: Console) -> None:
    """Print a table that fits eighty columns, on which tasks the first method is behind, and the verdicts."""
    table = Table(title=_title(found))
    headings = ("method", "rate", "score", "loss", "export's score", "its loss")
    for number, heading in enumerate(headings if found.seeds else headings[:2]):
        table.add_column(heading, justify="right" if number else "left")
    for arm in found.arms:
        cells = [cell for stage in STAGES if found.seeds for cell in _short_cells(found, arm[stage])]
        table.add_row(arm["name"], _rate(arm), *cells)
    console.print(table)
    for line in (*_losing(found), *verdicts(found)):
        console.print(line, highlight=False, soft_wrap=True)


def markdown(found: Comparison) -> str:
    """Return the table and the verdicts as Markdown."""
    headings = _headings()
    lines = [f"{_title(found)}.", "", "| " + " | ".join(headings) + " |", "| --- " * len(headings) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in _rows(found)]
    lines += ["", *(f"- {line}" for line in (*_losing(found), *verdicts(found))), ""]
    return "\n".join(lines)


def draw(found: Comparison, file: Path) -> bool:
    """Draw each arm's test loss with its interval, both stages; tell whether matplotlib is there to do it."""
    if importlib.util.find_spec("matplotlib") is None or not found.seeds:
        return False
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(figsize=(7, 0.7 * len(found.arms) + 1.6), layout="constrained")
    for stage, colour, shift in (("trained", "#1f6f8b", -0.12), ("export", "#c8683c", 0.12)):
        present = [(place, arm) for place, arm in enumerate(found.arms) if arm[stage] is not None]
        losses = [arm[stage]["loss"] for _, arm in present]
        ends = [arm[stage]["loss_interval"] for _, arm in present]
        bars = [[abs(loss - end[side]) for loss, end in zip(losses, ends, strict=True)] for side in (0, 1)]
        places = [place + shift for place, _ in present]
        axes.errorbar(losses, places, xerr=bars, fmt="o", color=colour, capsize=3, label=_HEADINGS[stage])
    axes.set_yticks(range(len(found.arms)), [arm["name"] for arm in found.arms])
    axes.invert_yaxis()
    axes.set_xlabel("loss on test rows, nats a token (95%); left is better")
    axes.legend(frameon=False)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
    return True


def _title(found: Comparison) -> str:
    steps = "the recipe's epochs" if found.steps is None else f"{found.steps} steps"
    rows = sum(found.rows.values())
    return f"{found.seeds} seeds, {steps}, {rows} test rows of {len(found.rows)} tasks, 95% intervals"


def _headings() -> list[str]:
    pairs = [f"{what} {_HEADINGS[stage]}" for stage in STAGES for what in ("score", "loss")]
    return ["method", "parameters", "rate", *pairs]


def _rows(found: Comparison) -> list[list[str]]:
    rows = []
    for arm in found.arms:
        row = [arm["name"], f"{arm['parameters']:,}", _rate(arm)]
        for stage in STAGES:
            row += _cells(found, arm.get(stage))
        rows.append(row)
    return rows


def _cells(found: Comparison, stage: dict[str, Any] | None) -> list[str]:
    if stage is None:
        return ["none", "none"] if found.seeds else ["", ""]
    low, high = stage["score_interval"]
    score = f"{stage['score']:.1%} ({low:.1%} to {high:.1%})" if found.is_share else f"{stage['score']:.4f}"
    low, high = stage["loss_interval"]
    return [score, f"{stage['loss']:.4f} ({low:.4f} to {high:.4f})"]


def _rate(arm: dict[str, Any]) -> str:
    return f"{arm['rate']:g}" + (" (edge)" if arm["at_edge"] else "")


def _short_cells(found: Comparison, stage: dict[str, Any] | None) -> list[str]:
    if stage is None:
        return ["none", "none"]
    low, high = stage["score_interval"]
    score = f"{stage['score']:.1%} ({low:.0%} to {high:.0%})" if found.is_share else f"{stage['score']:.4f}"
    return [score, f"{stage['loss']:.4f}"]


def _losing(found: Comparison) -> list[str]:
    """Name the tasks on which the first method is behind, for each other."""
    lines = []
    for arm in found.arms[1:] if found.seeds else ():
        by_task = arm["trained"]["loss_difference_by_task"]
        behind = [f"{task} ({value:+.4f})" for task, value in by_task.items() if value < 0]
        if behind:
            lines.append(f"{arm['name']} has the smaller loss on {', '.join(behind)}")
    return lines


__all__ = ["draw", "markdown", "show"]
