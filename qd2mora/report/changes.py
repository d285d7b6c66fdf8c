"""Tables of what was gained and forgotten, of runs in sequence, and of composite prompts."""

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from qd2mora.evaluation.change import Change
from qd2mora.evaluation.composite import Composite
from qd2mora.evaluation.sequence import RunsInTurn
from qd2mora.report.cells import with_columns


def show_changes(changes: Mapping[str, Change], against: str, console: Console) -> None:
    """Print each task's number before and now, and its change with its paired interval."""
    table = with_columns(
        Table(title=f"change from {against}, of the same rows (95% interval, paired)"),
        ["task", "before", "now", "change", "rows right before, not now / now, not before", ""],
    )
    for task, change in changes.items():
        low, high = change.interval
        moved = "" if change.lost is None else f"{change.lost} / {change.won} of {change.rows}"
        numbers = (f"{change.before:.4f}", f"{change.now:.4f}", f"{change.change:+.4f} ({low:+.4f} to {high:+.4f})")
        table.add_row(task, *numbers, moved, change.verdict)
    console.print(table)


def show_sequence(found: RunsInTurn, console: Console) -> None:
    """Print the matrix of runs by tasks, and what it comes to; a task's own run is marked."""
    tasks = list(found.learned)
    table = with_columns(Table(title="runs in the order of training, * the run that learned the task"), ["run", *tasks])
    for number, (run, scores) in enumerate(zip(found.runs, found.scores, strict=True)):
        marks = ("*" if found.learned[task] == number else "" for task in tasks)
        table.add_row(run, *(f"{scores[task].mean:.4f}{mark}" for task, mark in zip(tasks, marks, strict=True)))
    console.print(table)
    console.print(f"backward transfer {found.backward_transfer:+.4f}, forgetting {found.forgetting:+.4f}")
    show_changes(found.changes, "the run that learned each task", console)


def show_composite(found: Mapping[str, Composite], console: Console) -> None:
    """Print each task's score within composite prompts, by the place in which it was asked."""
    number = len(found)
    places = [f"place {place}" for place in range(1, number + 1)]
    table = with_columns(Table(title=f"{number} tasks in one prompt"), ["task", "score", "attempted", *places])
    for task, each in found.items():
        means = (f"{mean:.3f}" for mean in each.by_place)
        table.add_row(task, f"{each.mean:.3f}", f"{each.attempted} of {each.rows}", *means)
    console.print(table)


__all__ = ["show_changes", "show_composite", "show_sequence"]
