"""A comparison for people: a table on the terminal, the same in Markdown, and a picture (the extra `figures`)."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from qd2mora.comparison.outcome import STAGES, ArmOutcome, Comparison, StageOutcome, verdicts
from qd2mora.disk.durable import write_atomically
from qd2mora.redact import redacted
from qd2mora.report.bars import Span, span_chart
from qd2mora.report.cells import with_columns
from qd2mora.report.chart import Chart, KeyEntry
from qd2mora.report.figure import can_render, figure_svg, write_png

TIMED = ["method", "steps", "s a step", "score", "loss"]
HEADINGS = {"trained": "as trained", "export": "best static export"}


def show(found: Comparison, console: Console) -> None:
    """Print a table that fits eighty columns, on which tasks the first method is behind, and the verdicts."""
    headings = ["method", "rate"]
    if found.seeds:
        headings += ["score", "loss", "export's score", "its loss"]
    table = with_columns(Table(title=_title(found)), headings)
    for arm in found.arms:
        cells = [cell for stage in arm.stages.values() for cell in _short_cells(found, stage)]
        table.add_row(arm.name, _rate(arm), *cells)
    console.print(table)
    if any(arm.timed for arm in found.arms):
        timed = with_columns(Table(title="at equal time, as trained"), TIMED)
        for arm in found.arms:
            timed.add_row(*_timed_cells(found, arm, 0))
        console.print(timed)
    for line in (*_losing(found), *verdicts(found)):
        console.print(line, highlight=False, soft_wrap=True)


def markdown(found: Comparison) -> str:
    """Return the table and the verdicts as Markdown."""
    measured = [f"{what} {HEADINGS[stage]}" for stage in STAGES for what in ("score", "loss")]
    headings = ["method", "parameters", "rate", *measured]
    lines = [f"{_title(found)}.", "", "| " + " | ".join(headings) + " |", "| --- " * len(headings) + "|"]
    for arm in found.arms:
        cells = [cell for stage in STAGES for cell in _cells(found, arm.stages.get(stage))]
        lines.append("| " + " | ".join([arm.name, f"{arm.arm.parameters:,}", _rate(arm), *cells]) + " |")
    if any(arm.timed for arm in found.arms):
        lines += ["", "At equal time, as trained:", "", f"| {' | '.join(TIMED)} |", "| --- " * len(TIMED) + "|"]
        lines += [f"| {' | '.join(_timed_cells(found, arm, 1))} |" for arm in found.arms]
    lines += ["", *(f"- {line}" for line in (*_losing(found), *verdicts(found))), ""]
    return "\n".join(lines)


def write_tables(found: Comparison, folder: Path) -> list[str]:
    """Write `compare.md`, and `compare.png` where the renderer is there to do it; return what was written."""
    write_atomically(folder / "compare.md", redacted(markdown(found), named=False))
    if not can_render() or not found.seeds:
        return ["compare.md"]
    write_png(figure_svg(_title(found), [_loss_chart(found)]), folder / "compare.png")
    return ["compare.md", "compare.png"]


def _loss_chart(found: Comparison) -> Chart:
    """Return each arm's test loss with its interval, both stages."""
    losses = [
        Span(arm.name, *stage.loss.interval, STAGES.index(name), middle=stage.loss.mean)
        for arm in found.arms
        for name, stage in arm.stages.items()
        if stage is not None
    ]
    key = tuple(KeyEntry(HEADINGS[stage], number) for number, stage in enumerate(STAGES))
    return span_chart("loss on test rows", losses, "nats a token (95%); left is better", key)


def _title(found: Comparison) -> str:
    steps = "the recipe's epochs"
    if found.steps is not None:
        steps = f"{found.steps} steps"
    rows = sum(found.rows.values())
    return f"{found.seeds} seeds, {steps}, {rows} test rows of {len(found.rows)} tasks, 95% intervals"


def _cells(found: Comparison, stage: StageOutcome | None) -> list[str]:
    if not found.seeds:
        return ["", ""]
    if stage is None:
        return ["none", "none"]
    low, high = stage.loss.interval
    return [_score(found, stage, 1), f"{stage.loss.mean:.4f} ({low:.4f} to {high:.4f})"]


def _timed_cells(found: Comparison, arm: ArmOutcome, digits: int) -> list[str]:
    """Return an arm's line of the table at equal time."""
    assert arm.timed is not None and arm.at_equal_time is not None
    steps, seconds = arm.timed
    score, loss = _score(found, arm.at_equal_time, digits), arm.at_equal_time.loss
    low, high = loss.interval
    return [arm.name, f"{steps}", f"{seconds:.3g}", score, f"{loss.mean:.4f} ({low:.4f} to {high:.4f})"]


def _short_cells(found: Comparison, stage: StageOutcome | None) -> list[str]:
    if stage is None:
        return ["none", "none"]
    return [_score(found, stage, 0), f"{stage.loss.mean:.4f}"]


def _score(found: Comparison, stage: StageOutcome, digits: int) -> str:
    """Return a score, a share with its interval, whose ends have so many `digits`."""
    low, high = stage.score.interval
    if not found.is_share:
        return f"{stage.score.mean:.4f}"
    return f"{stage.score.mean:.1%} ({low:.{digits}%} to {high:.{digits}%})"


def _rate(arm: ArmOutcome) -> str:
    if arm.tuned.edges:
        return f"{arm.tuned.setting.name} (edge)"
    return arm.tuned.setting.name


def _losing(found: Comparison) -> list[str]:
    """Name the tasks on which the first method is behind, for each other."""
    lines = []
    for arm in found.arms[1:]:
        trained = arm.stages.get("trained")
        if trained is None or trained.loss_difference is None:
            continue
        by_task = trained.loss_difference.by_task
        behind = [f"{task} ({value:+.4f})" for task, value in by_task.items() if value < 0]
        if behind:
            lines.append(f"{arm.name} has the smaller loss on {', '.join(behind)}")
    return lines


__all__ = ["show", "write_tables"]
