"""The page of a run: facts, curves, memory, scores, export, routing, experts, samples."""

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

from qd2mora import __version__
from qd2mora.disk.durable import write_atomically
from qd2mora.errors import InputRefused
from qd2mora.memory.table import show_bytes
from qd2mora.redact import redacted
from qd2mora.report.cells import clock_time
from qd2mora.report.chart import Chart
from qd2mora.report.curves import Point, Series, line_chart, smoothed
from qd2mora.report.page import card, escape, facts, folded, grid, page, paragraph, table, tiles
from qd2mora.report.routing_page import experts_section, routing_section
from qd2mora.report.run_contents import ByTask, ExportReport, LoggedEvaluation, RunContents, TaskScore
from qd2mora.report.scores import WORDS
from qd2mora.safekeeping.inventory import noted
from qd2mora.safekeeping.places import check_file

NATS = "nats a labelled token"
MODELS = ("base", "adapter", "fp16 export")
NUM_WORST = 10


def write_page(run: RunContents, out: Path | None = None) -> Path:
    """Write the page of a run to `out`, else into its folder; return where. Raises InputRefused."""
    target = out or run.folder.report
    if out is not None:
        check_page(out)
    with noted(target):
        write_atomically(target, redacted(run_page(run), named=False))
    return target


def check_page(target: Path) -> None:
    """Refuse what no page can be written to. Raises InputRefused."""
    if target.is_dir() or not target.parent.is_dir():
        raise InputRefused(f"--html: '{target}' will not do: name a file in a folder that is there")
    check_file(target, "--html", b"<!doctype html>", "a page")


def run_page(run: RunContents) -> str:
    """Return the page as HTML."""
    adapter, base = run.recipe.adapter, run.recipe.base
    lead = f"<p>{escape(adapter.method)} on {escape(_short(base.model))}, {len(run.recipe.data.tasks)} tasks</p>"
    banner = ""
    if run.alarm:
        banner = f'<div class="warn" role="alert">{escape(run.alarm.capitalize())}</div>'
    if run.advice:
        banner += f'<div class="warn">{escape(run.advice[0].upper() + run.advice[1:])}</div>'
    if run.damaged:
        banner += f'<div class="warn">Not shown, as it is damaged: {escape(", ".join(run.damaged))}</div>'
    sections = [(name, _built(build, run)) for name, build in SECTIONS.items()]
    return page(run.name, lead, sections, banner, f"qd2mora {escape(__version__)}")


def _built(build: Callable[[RunContents], str], run: RunContents) -> str:
    """Return a section; numbers and names that no run of ours writes cost their own section alone."""
    try:
        return build(run)
    except (LookupError, ValueError, ArithmeticError) as error:
        return paragraph(f"Not shown: a file of the run is not as expected ({type(error).__name__}: {error}).")


def _main_numbers(run: RunContents) -> str:
    found = []
    # A loss alone says little: where it began stands beside it.
    losses = run.mean_losses()
    if losses:
        found.append((f"held-out loss, mean of tasks (from {losses[0]:.3f})", f"{losses[-1]:.3f}"))
    for name in MODELS:
        by_task = run.scores.get(name)
        if by_task and _mean_score(by_task) <= 1:
            found.append((f"mean score, {name}", f"{_mean_score(by_task):.1%}"))
    if run.manifest.plan.trainable_parameters is not None:
        found.append(("trained parameters", f"{run.manifest.plan.trainable_parameters:,}"))
    speeds = run.curve(lambda line: line.tokens_per_s)
    if speeds:
        found.append(("tokens a second, median", f"{statistics.median(value for _, value in speeds):,.0f}"))
    if _measured_peak(run):
        found.append(("measured peak memory", show_bytes(_measured_peak(run))))
    return tiles(found)


def _measured_peak(run: RunContents) -> int:
    """Return the most bytes that were in use, 0 where nobody measured."""
    return next((line.memory for line in reversed(run.steps) if line.memory is not None), 0)


def _facts(run: RunContents) -> str:
    recipe, manifest = run.recipe, run.manifest
    adapter = recipe.adapter
    quantisation, targets, done = str(recipe.base.quantization), str(adapter.targets), "0"
    if recipe.base.double_quant:
        quantisation += ", doubly"
    if not isinstance(adapter.targets, str):
        targets = ", ".join(adapter.targets or ())
    if run.steps:
        done = f"{run.steps[-1].step:,}"
        if run.steps[-1].bad_steps:
            done += f", of which {run.steps[-1].bad_steps} not finite and skipped"
    trained = [
        ("base", _short(recipe.base.model)),
        ("quantisation", quantisation),
        ("method", adapter.method),
        ("rank, alpha", f"{adapter.rank}, {adapter.alpha}"),
        ("targets", targets),
        ("steps done", done),
        ("time of the steps", _time(run)),
        ("rows a step", recipe.train.global_batch),
        ("learning rate", f"{recipe.train.learning_rate:g}, {recipe.train.schedule}, {recipe.train.optimizer}"),
        ("device", manifest.device),
        ("seed", recipe.train.seed),
    ]
    if recipe.train.stages is not None:
        each = (f"{stage.train} ({stage.steps or 'what is left'})" for stage in recipe.train.stages)
        trained.append(("stages (steps)", ", ".join(each)))
    prefix = "versions."
    versions = [(key.removeprefix(prefix), each) for key, each in manifest.identity.items() if key.startswith(prefix)]
    changes = [(f"from step {change.step}", ", ".join(change.changed)) for change in manifest.lineage]
    return grid([card("what was trained", facts(trained)), card("versions", facts([*versions, *changes]))]) + folded(
        "the whole recipe", f"<pre>{escape(recipe.dump_yaml())}</pre>"
    )


def _time(run: RunContents) -> str:
    if run.training_s is None:
        return "not logged"
    return f"{clock_time(run.training_s)}, evaluations and saves apart"


def _short(model: str) -> str:
    """Return a hub id as it is, and the end of a folder's path: the recipe tells it whole."""
    return "/".join(Path(model).parts[-2:])


def _curves(run: RunContents) -> str:
    if not run.curve(lambda line: line.loss):
        return paragraph("No step has been logged yet.")
    norms = _measured_chart("gradient norm", run.curve(lambda line: line.grad_norm), is_log=True)
    speeds = _measured_chart("tokens a second", run.curve(lambda line: line.tokens_per_s))
    rates = Series("learning rate", run.curve(lambda line: line.learning_rate))
    scores = line_chart("scores by task", _task_lines(run, lambda line: line.eval_score), low=0.0)
    unit = NATS if run.recipe.objective.is_sft else f"of {run.recipe.objective.kind}, a row"
    preferred, margins, rewards = (
        line_chart(f"{name} by task", _task_lines(run, partial(_measured, name=name)), low=0.0)
        for name in ("accuracy", "margin", "reward")
    )
    charts = [
        (training_chart(run), f"{unit}; faint: each step"),
        (held_out_chart(run), unit),
        (preferred, "better answers preferred, or ratings agreed with"),
        (margins, "of the better answers' rewards"),
        (rewards, "of greedy answers, by the rule; their held-out loss is minus that"),
        (scores, "of the task's own metric"),
        (line_chart("learning rate", [rates], low=0.0), ""),
        (norms, "before clipping; faint: each step"),
        (speeds, "faint: each step"),
    ]
    # Scores are there only where a task names a metric, and preferences where they are learned; others always are.
    rare = (preferred, margins, rewards, scores)
    return grid(card(chart.title, chart.html(), note) for chart, note in charts if chart.drawing or chart not in rare)


def _measured(line: LoggedEvaluation, name: str) -> ByTask:
    return line.measured(name)


def training_chart(run: RunContents) -> Chart:
    """Return the training loss, each step's faint behind the mean of its neighbours."""
    losses = run.curve(lambda line: line.loss)
    lines = [Series("each step", losses, is_faint=True), Series("mean of neighbours", smoothed(losses))]
    return line_chart("training loss", lines, is_log=True)


def held_out_chart(run: RunContents) -> Chart:
    """Return the held-out loss of each task."""
    return line_chart("held-out loss by task", _task_lines(run, lambda line: line.eval_loss), is_log=True)


def _task_lines(run: RunContents, numbers: Callable[[LoggedEvaluation], ByTask]) -> list[Series]:
    lines = []
    for number, task in enumerate(run.recipe.data.tasks):
        points = run.task_curve(numbers, task.name)
        lines.append(Series(task.name, points, number, has_dots=len(points) < 40))
    return lines


def _measured_chart(name: str, points: list[Point], *, is_log: bool = False) -> Chart:
    """Return one number's curve: what was measured, faint, and its mean over neighbours."""
    lines = [Series(name, points, is_faint=True), Series(name, smoothed(points))]
    if is_log:
        return line_chart(name, lines, is_log=True)
    return line_chart(name, lines, low=0.0)


def _memory(run: RunContents) -> str:
    plan, measured = run.manifest.plan, _measured_peak(run)
    if not plan.items:
        return paragraph("No plan in the run's manifest.")
    whole = max(plan.peak_bytes, measured)
    rows = [_memory_row(name, size, whole) for name, size in sorted(plan.items.items(), key=lambda item: -item[1])]
    rows.append(_memory_row("planned peak", plan.peak_bytes, whole))
    if measured:
        rows.append(_memory_row("measured peak", measured, whole, "other"))
    note = "the items are alive at the planned peak and sum up to it"
    if run.manifest.device == "cpu":
        note += "; on a CPU what is measured is the whole process, with Python and its libraries"
    chosen = [[escape(name), escape(choice.value), escape(choice.reason)] for name, choice in plan.choices.items()]
    choices = (
        table(("chosen", "value", "why"), chosen)
        .replace("<td>", '<td class="left">')
        .replace("<th ", '<th class="left" ')
    )
    return grid(
        [card("planned and measured", table(("item", "memory", ""), rows), note), card("what was chosen", choices)]
    )


def _memory_row(name: str, size: int, whole: int, kind: str = "") -> list[str]:
    bar = f'<span class="bar {kind}" style="width:{100 * size / whole:.1f}%"></span>'
    return [escape(name), escape(show_bytes(size)).replace(" ", "&nbsp;"), f'<div style="min-width:72px">{bar}</div>']


def _scores(run: RunContents) -> str:
    models = {name: by_task for name, by_task in run.scores.items() if by_task}
    if not models:
        return paragraph("Not scored: `finish.score: true` in the recipe, or `qd2mora eval`.")
    tasks = list(dict.fromkeys(task for by_task in models.values() for task in by_task))
    rows = [[escape(task), *(_score(by_task.get(task)) for by_task in models.values())] for task in tasks]
    metrics = {score.metric for by_task in models.values() for score in by_task.values()}
    # A mean of a loss and of shares says nothing.
    has_mean = len(metrics) == 1
    if has_mean:
        form = ".4f" if "loss" in metrics else ".1%"
        rows.append(["mean", *(format(_mean_score(by_task), form) for by_task in models.values())])
    note = f"{', '.join(sorted(WORDS.get(metric, metric) for metric in metrics))} on held-out rows, with 95% intervals"
    return card("scores by task", table(("task", *models), rows, last_is_sum=has_mean), note)


def _score(score: TaskScore | None) -> str:
    if score is None:
        return ""
    low, high = score.interval
    if score.metric == "loss":
        return f"{score.score:.4f} <small>({low:.3f} to {high:.3f})</small>"
    return f"{score.score:.1%} <small>({low:.0%} to {high:.0%})</small>"


def _mean_score(by_task: dict[str, TaskScore]) -> float:
    return sum(score.score for score in by_task.values()) / len(by_task)


def _export(run: RunContents) -> str:
    report = run.export
    if report is None:
        return paragraph("No export in the run folder; `qd2mora merge` makes one and measures it.")
    how = "an approximation"
    if report.exact:
        how = "exact up to rounding"
    kept = [("strategy", f"{report.strategy}, {how}")]
    if report.loss is not None:
        kept += [(f"held-out loss, {name}", f"{value:.4f}") for name, value in report.loss.items()]
    if report.gain_kept is not None:
        kept.append(("share of the gain kept", f"{report.gain_kept:.1%}"))
    if report.kl_per_token is not None:
        kept.append(("KL from the routed adapter", f"{report.kl_per_token:.4f} nats a token"))
    return grid([card("what the export keeps", facts(kept)), *_lossy_linears(report)])


def _lossy_linears(report: ExportReport) -> list[str]:
    """Return a card of the linears that lose most; none where the export is exact."""
    if report.exact or not report.modules:
        return []
    worst = sorted(report.modules.items(), key=lambda item: -item[1]["unexplained"])[:NUM_WORST]
    lines = [[escape(name.removeprefix("model.layers.")), f"{each['unexplained']:.2%}"] for name, each in worst]
    note = "share of the adapter's output in a linear that no static weights of this strategy give"
    return [card("linears that lose most", table(("linear", "unexplained"), lines), note)]


def _samples(run: RunContents) -> str:
    if not run.samples:
        return paragraph("No samples: a run that is scored at its end keeps some.")
    cards = []
    for sample in run.samples:
        answers = {"right": sample.right, **sample.answers}
        cards.append(card(sample.task, f"<pre>{escape(sample.prompt)}</pre>{facts(answers.items())}"))
    return grid(cards)


SECTIONS: dict[str, Callable[[RunContents], str]] = {
    "Run": lambda run: _main_numbers(run) + _facts(run),
    "Training": _curves,
    "Memory": _memory,
    "Scores": _scores,
    "Export": _export,
    "Routing": routing_section,
    "Experts": experts_section,
    "Samples": _samples,
}

__all__ = ["check_page", "held_out_chart", "run_page", "training_chart", "write_page"]
