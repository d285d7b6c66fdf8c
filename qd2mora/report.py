"""What a person reads: tables of scores and exports, rows as the model sees them, the methods, and a run's ending."""

import shutil
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qd2mora.base import SHAPES, load_tokenizer
from qd2mora.data import Row, TaskRows, prepare
from qd2mora.evaluation import Score, open_subject, score_tasks
from qd2mora.merging import Export, merge
from qd2mora.mixture import MixtureConfig
from qd2mora.mixture.counts import llama_linears, trainable_parameters
from qd2mora.mixture.method import TASK, Gate, Method
from qd2mora.mixture.presets import METHODS, find_method
from qd2mora.recipe import Recipe
from qd2mora.run_folder import RunFolder, read_recipe, write_json

EXPORT = {"static": "exact", "task": "exact per task", "token": "measured"}
WHAT_IT_MEANS = {
    "static": "merges exactly",
    "task": "merges exactly for one task",
    "token": "merges approximately, measured",
}


FORMULA = {
    "verified": "as in the authors' code",
    "reconstruction": "partly inferred",
    "part": "the part that carries over",
}


def finish(run: Path, console: Console) -> None:
    """End a training: export and score as the recipe's `finish` says, then tell where everything lies."""
    folder, recipe = RunFolder(run), read_recipe(run)
    lies = {"adapter": folder.adapter, "recipe": folder.recipe, "metrics": folder.metrics}
    row = find_method(recipe.adapter.method)
    by_task = row.depends_on == TASK and row.reads_task and len(recipe.data.tasks) > 1
    if recipe.finish.export and (by_task or row.reads_vector):
        which = "--vector NUMBERS" if row.reads_vector else "--task NAME"
        console.print(f"no export: this method routes by row; `qd2mora merge {which}` exports for one")
    elif recipe.finish.export and row.placement == "block":
        console.print("no export: this method stands beside a whole block, and no weight can take its update")
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
        console.print(method_text(find_method(name)), highlight=False, soft_wrap=True, markup=False)
        return
    table = Table()
    for heading in ("method", "what", "export", "formula", "parameters on 7B"):
        table.add_column(heading, justify="right" if heading.startswith("parameters") else "left")
    for method in METHODS.values():
        count = f"{parameters_on_7b(method) / 1e6:.1f}M"
        table.add_row(method.name, method.title, _export_word(method), method.mark, count)
    console.print(table)
    console.print("`qd2mora methods NAME` prints a method's equation, routers, defaults and source")


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


def method_text(method: Method) -> str:
    """Return a method in full: equation, source, what was inferred, routers, defaults."""
    scaling = "alpha / total rank" if method.scaling_rank == "total" else "alpha / rank"
    experts = f"{method.down} down, {method.up} up, {method.pairing}"
    rows = {
        "equation": method.equation,
        "source": method.source,
        "formula": FORMULA[method.mark] + (f"; {method.note}" if method.note else ""),
        "K depends on": f"{method.depends_on}: {WHAT_IT_MEANS[method.depends_on]}",
        "rank": ", ".join(map(str, method.ranks or (method.rank,))),
        "alpha": f"{method.alpha:g} (scaled by {scaling})",
        "experts": experts + (f", {method.allocation} by depth" if method.allocation else ""),
        "core": method.core + (f" of {method.cores}" if method.cores else ""),
        **{f"router {role}": _gate_text(gate) for role, gate in method.gates.items()},
        "penalties": ", ".join(f"{each.kind} {each.weight:g}" for each in method.penalties) or "none",
        "init": f"down experts {method.init_down}, up experts zero",
        "targets": ", ".join(method.targets),
        "parameters": f"{parameters_on_7b(method):,} on LLaMA-7B with these defaults",
        "given LoRAs": {"no": "not taken", "allowed": "taken by adapter.adapters", "needed": "needed"}[method.given],
    }
    return method.title + "".join(f"\n  {key:13} {value}" for key, value in rows.items())


def parameters_on_7b(method: Method) -> int:
    """Return what a method trains on LLaMA-7B with its own defaults: eight tasks, vectors of 64 numbers."""
    shape = SHAPES["llama-7b"]
    linears = llama_linears(shape.hidden, shape.intermediate, shape.hidden, shape.hidden)
    config = MixtureConfig(
        method=method.name,
        num_tasks=8 if method.reads_task else None,
        external_width=64 if method.reads_vector else None,
        target_modules=list(method.targets),
    )
    return trainable_parameters(config, linears, shape.layers, shape.hidden)


def _export_word(method: Method) -> str:
    if method.placement == "block":
        return "none"
    return "exact per vector" if method.reads_vector else EXPORT[method.depends_on]


def _gate_text(gate: Gate) -> str:
    """The six fields, then every number that differs from a plain softmax router's."""
    plain = Gate()
    numbers = ("top_k", "top_p", "temperature", "entropy_limit", "capacity", "omega", "width", "bias_rate")
    words = f"input {gate.input}, granularity {gate.granularity}, scope {gate.scope}, score {gate.score}, "
    words += f"select {gate.select}, weight {gate.weight}"
    changed = [f"{key} {getattr(gate, key):g}" for key in numbers if getattr(gate, key) != getattr(plain, key)]
    return ", ".join([words, *changed])


__all__ = [
    "finish",
    "method_text",
    "parameters_on_7b",
    "show_export",
    "show_methods",
    "show_rows",
    "show_scores",
    "verdict",
]
