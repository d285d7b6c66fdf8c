"""Tables of scores: one row a task, one column a model."""

from rich.console import Console
from rich.table import Table

from qd2mora.evaluation import Score


def show_scores(columns: dict[str, dict[str, Score]], console: Console) -> None:
    """Print accuracy per task, one column a model, with the mean over tasks."""
    table = Table(title="exact answers on held-out rows")
    table.add_column("task")
    for name in columns:
        table.add_column(name, justify="right")
    tasks = list(next(iter(columns.values())))
    for task in tasks:
        table.add_row(task, *(_percent(scores[task]) for scores in columns.values()))
    means = [sum(score.accuracy for score in scores.values()) / len(tasks) for scores in columns.values()]
    table.add_row("mean", *(f"{mean:.1%}" for mean in means), style="bold")
    console.print(table)


def _percent(score: Score) -> str:
    low, high = score.interval
    return f"{score.accuracy:.1%} [dim]({low:.0%} to {high:.0%})[/dim]"


__all__ = ["show_scores"]
