"""Tables of scores: one row a task, one column a model."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qd2mora.evaluation import Score
from qd2mora.evaluation.answer_file import TaskNumbers
from qd2mora.report.cells import with_columns

WORDS = {
    "exact": "exact answers",
    "extract": "right answers",
    "choice": "right choices",
    "rouge": "ROUGE-L",
    "preferred": "better answers preferred",
    "rated": "ratings agreed with",
    "loss": "loss a token, lower is better",
}


def show_scores(columns: dict[str, dict[str, Score]], console: Console) -> None:
    """Print each task's score, one column a model, with the mean over tasks where all are scored alike."""
    first = next(iter(columns.values()))
    metrics, rows = {score.metric for score in first.values()}, {score.rows for score in first.values()}
    is_mixed = len(metrics) > 1
    asked = f"{min(rows)} rows a task"
    if len(rows) > 1:
        asked = f"{min(rows)} to {max(rows)} rows a task"
    if is_mixed:
        table = with_columns(Table(title=f"scores, {asked} (95% interval)"), ["task", "what", *columns], ("what",))
    else:
        table = with_columns(Table(title=f"{WORDS[min(metrics)]}, {asked} (95% interval)"), ["task", *columns])
    for task, score in first.items():
        cells = [shown(scores[task]) for scores in columns.values()]
        if is_mixed:
            cells.insert(0, Text(WORDS[score.metric]))
        table.add_row(task, *cells)
    if not is_mixed:
        form = ".4f" if "loss" in metrics else ".1%"
        means = [sum(score.mean for score in scores.values()) / len(scores) for scores in columns.values()]
        table.add_row("mean", *(format(mean, form) for mean in means), style="bold")
    console.print(table)
    for task, score in first.items():
        if score.tied:
            console.print(
                f"{task}: samples were tied on {score.tied} of {score.rows} rows; there the answer drawn first counts"
            )


def shown(score: Score) -> Text:
    """Return a score with its interval."""
    low, high = score.interval
    if score.metric == "loss":
        return Text.assemble(f"{score.mean:.4f} ", (f"({low:.3f} to {high:.3f})", "dim"))
    more = ""
    if score.accuracy_normalized is not None:
        more = f", {score.accuracy_normalized:.1%} a token"
    if score.margin is not None:
        more = f", margin {score.margin:.3g}"
    return Text.assemble(f"{score.mean:.1%} ", (f"({low:.0%} to {high:.0%}){more}", "dim"))


def show_harness(results: TaskNumbers, console: Console) -> None:
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
