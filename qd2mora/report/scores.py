"""Tables of scores: one row a task, one column a model."""

from typing import Any

from rich.console import Console
from rich.table import Table

from qd2mora.evaluation import Score

WORDS = {
    "exact": "exact answers",
    "extract": "right answers",
    "choice": "right choices",
    "rouge": "ROUGE-L",
    "loss": "loss a token, lower is better",
}


def show_scores(columns: dict[str, dict[str, Score]], console: Console) -> None:
    """Print each task's score, one column a model, with the mean over tasks where all are scored alike."""
    first = next(iter(columns.values()))
    metrics = {score.metric for score in first.values()}
    rows = {score.rows for score in first.values()}
    asked = f"{min(rows)} rows a task" if len(rows) == 1 else f"{min(rows)} to {max(rows)} rows a task"
    what = WORDS[metrics.pop()] if len(metrics) == 1 else "scores"
    table = Table(title=f"{what}, {asked} (95% interval)")
    table.add_column("task")
    mixed = len({score.metric for score in first.values()}) > 1
    if mixed:
        table.add_column("what")
    for name in columns:
        table.add_column(name, justify="right")
    for task, score in first.items():
        cells = [shown(scores[task]) for scores in columns.values()]
        table.add_row(task, *([WORDS[score.metric]] if mixed else []), *cells)
    if not mixed:
        share = next(iter(first.values())).metric != "loss"
        means = [sum(score.mean for score in scores.values()) / len(scores) for scores in columns.values()]
        table.add_row("mean", *(f"{mean:.1%}" if share else f"{mean:.4f}" for mean in means), style="bold")
    console.print(table)


def shown(score: Score) -> str:
    """Return a score with its interval."""
    low, high = score.interval
    if score.metric == "loss":
        return f"{score.mean:.4f} [dim]({low:.3f} to {high:.3f})[/dim]"
    normalized = score.to_json().get("accuracy_normalized")
    more = f", {normalized:.1%} a token" if isinstance(normalized, float) else ""
    return f"{score.mean:.1%} [dim]({low:.0%} to {high:.0%}){more}[/dim]"


def show_harness(results: dict[str, dict[str, Any]], console: Console) -> None:
    """Print what lm-evaluation-harness measured, one row a number."""
    table = Table("task", "metric", "value", "standard error", title="lm-evaluation-harness")
    for task, numbers in results.items():
        for name, value in numbers.items():
            metric, _, kind = name.partition(",")
            if isinstance(value, float) and not metric.endswith("_stderr"):
                error = numbers.get(f"{metric}_stderr,{kind}")
                table.add_row(task, metric, f"{value:.4f}", f"{error:.4f}" if isinstance(error, float) else "")
    console.print(table)


__all__ = ["show_harness", "show_scores", "shown"]
