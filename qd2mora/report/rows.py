"""Rows as the model sees them, and what was cut, dropped or held out."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qd2mora.base import load_tokenizer
from qd2mora.data import Row, TaskRows, prepare
from qd2mora.recipe import Recipe


def show_rows(recipe: Recipe, number: int, console: Console) -> None:
    """Print rows of every task as the model sees them, and what was cut, dropped or held out."""
    tokenizer = load_tokenizer(recipe.base.model)
    tasks = prepare(recipe.data, tokenizer, recipe.train.seed)
    for task in tasks:
        console.rule(task.task.name)
        for row in task.train[:number]:
            console.print(_coloured(row, tokenizer), soft_wrap=True, highlight=False)
            console.print(f"[dim]{len(row.ids)} tokens, {row.num_labels} learned[/dim]")
    console.print(_lengths(tasks))
    console.print("dim: given; green: learned")


def _coloured(row: Row, tokenizer: object) -> str:
    decode = tokenizer.decode  # type: ignore[attr-defined]
    given, learned = decode(row.ids[: row.masked]), decode(row.ids[row.masked :])
    return f"[dim]{escape(given)}[/dim][green]{escape(learned)}[/green]"


def _lengths(tasks: list[TaskRows]) -> Table:
    table = Table(title="rows and lengths")
    for heading in ("task", "train", "held out", "median", "longest", "learned", "cut", "dropped", "skipped"):
        table.add_column(heading, justify="left" if heading == "task" else "right")
    for task in tasks:
        lengths = sorted(len(row.ids) for row in task.train)
        learned = sum(row.num_labels for row in task.train) / sum(lengths)
        numbers = (len(task.train), len(task.validation), lengths[len(lengths) // 2], lengths[-1])
        lost = (task.num_cut, task.num_dropped, task.skipped.total)
        table.add_row(task.task.name, *map(str, numbers), f"{learned:.0%}", *map(str, lost))
    return table


__all__ = ["show_rows"]
