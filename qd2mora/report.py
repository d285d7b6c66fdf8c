"""What a person reads: tables of scores and exports, rows as the model sees them, the methods, and a run's ending."""

import shutil
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qd2mora.base import load_tokenizer
from qd2mora.data import Row, TaskRows, prepare
from qd2mora.evaluation import Score, open_subject, score_tasks
from qd2mora.merging import Export, merge
from qd2mora.mixture.presets import METHODS, TASK, Method, find_method
from qd2mora.recipe import Recipe
from qd2mora.run_folder import RunFolder, read_recipe, write_json

WHAT_IT_MEANS = {
    "static": "merges exactly",
    "task": "merges exactly for one task",
    "token": "merges approximately, measured",
}


def finish(run: Path, console: Console) -> None:
    """End a training: export and score as the recipe's `finish` says, then tell where everything lies."""
    folder, recipe = RunFolder(run), read_recipe(run)
    lies = {"adapter": folder.adapter, "recipe": folder.recipe, "metrics": folder.metrics}
    by_task = find_method(recipe.adapter.method).depends_on == TASK and len(recipe.data.tasks) > 1
    if recipe.finish.export and by_task:
        console.print("no export: this method routes by task; `qd2mora merge --task NAME` exports for one")
    elif recipe.finish.export:
        shutil.rmtree(folder.export, ignore_errors=True)
        show_export(merge(run, folder.export), folder.export, console)
        lies["fp16 export"] = folder.export
    if recipe.finish.score:
        _score_all(folder, recipe, console)
        lies["scores"] = run / "scores.json"
    for name, path in lies.items():
        console.print(f"{name:12} {path}", highlight=False, soft_wrap=True)


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


def show_export(export: Export, out: Path, console: Console) -> None:
    """Print what an export keeps: per linear, and end to end in one line."""
    if not export.exact:
        console.print(_unexplained(export))
    console.print(f"export       {out}", highlight=False, soft_wrap=True)
    console.print(verdict(export), highlight=False, soft_wrap=True)


def _unexplained(export: Export) -> Table:
    """One row a layer, one column a kind of linear."""
    shares: dict[str, dict[str, float]] = {}
    for name, share in export.unexplained.items():
        layer, _, kind = name.removeprefix("model.layers.").partition(".")
        shares.setdefault(layer, {})[kind.rpartition(".")[2] or name] = share
    kinds = sorted({kind for row in shares.values() for kind in row})
    table = Table("layer", *kinds, title=f"share of the adapter's output that static weights miss ({export.strategy})")
    for layer, row in shares.items():
        table.add_row(layer, *(f"{row[kind]:.2%}" if kind in row else "" for kind in kinds))
    return table


def verdict(export: Export) -> str:
    """Say in one line what the export is worth."""
    how = "exact up to float16 rounding" if export.exact else f"{export.strategy}, an approximation"
    fidelity = export.fidelity
    if fidelity is None:
        return f"{how}; no held-out rows to measure it on"
    kept = "no gain to keep" if fidelity.gain_kept is None else f"keeps {fidelity.gain_kept:.1%} of the gain"
    return (
        f"merged {kept} (held-out loss: base {fidelity.base:.4f}, routed {fidelity.routed:.4f}, merged "
        f"{fidelity.merged:.4f}; KL {fidelity.kl_per_token:.4f} nats a token); {how}"
    )


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


def show_methods(name: str | None, console: Console) -> None:
    """Print the table of methods, or one in full."""
    if name is not None:
        console.print(_method_text(find_method(name)), highlight=False, soft_wrap=True)
        return
    table = Table()
    for heading in ("method", "what", "export"):
        table.add_column(heading)
    for method in METHODS.values():
        table.add_row(method.name, method.title, WHAT_IT_MEANS[method.depends_on])
    console.print(table)


def _score_all(folder: RunFolder, recipe: Recipe, console: Console) -> None:
    subject = open_subject(folder.path)
    tasks = prepare(recipe.data, subject.tokenizer, recipe.train.seed)
    columns = {}
    with subject.without_adapter():
        columns["base"] = score_tasks(subject, tasks)
    columns["adapter"] = score_tasks(subject, tasks)
    if folder.export.is_dir():
        columns["fp16 export"] = score_tasks(replace(open_subject(folder.export), run=None), tasks)
    if not columns["base"]:
        console.print("nothing to score: no task holds out rows (data.tasks.0.validation=100)")
        return
    show_scores(columns, console)
    content = {name: {task: score.to_json() for task, score in scores.items()} for name, scores in columns.items()}
    write_json(folder.path / "scores.json", content)


def _percent(score: Score) -> str:
    low, high = score.interval
    return f"{score.accuracy:.1%} [dim]({low:.0%} to {high:.0%})[/dim]"


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


def _method_text(method: Method) -> str:
    rows = {
        "equation": method.equation,
        "source": method.source,
        "rank": method.rank,
        "alpha": f"{method.alpha:g} (scaling alpha / {'total rank' if method.scaling_rank == 'total' else 'rank'})",
        "experts": f"{method.down} down, {method.up} up, {method.pairing}",
        "penalty": f"{method.penalty:g}",
        "K depends on": f"{method.depends_on}: {WHAT_IT_MEANS[method.depends_on]}",
    }
    return method.title + "".join(f"\n  {key:13} {value}" for key, value in rows.items())


__all__ = ["finish", "show_export", "show_methods", "show_rows", "show_scores", "verdict"]
