"""The page of a run: facts, curves, memory, scores, export, routing, experts, samples."""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qd2mora import __version__
from qd2mora.disk.durable import write_atomically
from qd2mora.errors import InputRefused
from qd2mora.memory.table import show_bytes
from qd2mora.report.charts import Series, line_chart, smoothed
from qd2mora.report.page import card, escape, facts, folded, grid, page, paragraph, table, tiles
from qd2mora.report.routing_page import experts_section, routing_section
from qd2mora.report.run_files import RunFiles
from qd2mora.report.scores import WORDS


def write_page(files: RunFiles, out: Path | None = None) -> Path:
    """Write the page of a run to `out`, else into its folder; return where. Raises InputRefused."""
    target = out or files.folder.report
    if target.is_dir() or not target.parent.is_dir():
        raise InputRefused(f"--html: '{target}' will not do: name a file in a folder that is there")
    write_atomically(target, run_page(files))
    return target


def run_page(files: RunFiles) -> str:
    """Return the page as HTML."""
    adapter, base = files.recipe.adapter, files.recipe.base
    lead = f"<p>{escape(adapter.method)} on {escape(_short(base.model))}, {len(files.recipe.data.tasks)} tasks</p>"
    banner = f'<div class="warn" role="alert">{escape(files.alarm.capitalize())}</div>' if files.alarm else ""
    if files.damaged:
        banner += f'<div class="warn">Not shown, as it is damaged: {escape(", ".join(files.damaged))}</div>'
    sections = [(name, _built(build, files)) for name, build in SECTIONS.items()]
    return page(files.name, lead, sections, banner, f"qd2mora {escape(__version__)}")


def _built(build: Callable[[RunFiles], str], files: RunFiles) -> str:
    """Return a section; a file that is JSON but not what a run writes costs its own section alone."""
    try:
        return build(files)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        return paragraph(f"Not shown: a file of the run is not as expected ({type(error).__name__}: {error}).")


def _main_numbers(files: RunFiles) -> list[tuple[str, str]]:
    found = []
    first, last = _mean_loss(files, 0), _mean_loss(files, -1)
    if last is not None:
        found.append(("held-out loss, mean of tasks" + (f" (from {first:.3f})" if first else ""), f"{last:.3f}"))
    for name in ("base", "adapter", "fp16 export"):
        mean = _mean_score(files.scores, name)
        if mean is not None and mean <= 1:
            found.append((f"mean score, {name}", f"{mean:.1%}"))
    plan = files.manifest.get("plan", {})
    if isinstance(plan.get("trainable_parameters"), int):
        found.append(("trained parameters", f"{plan['trainable_parameters']:,}"))
    speeds, memory = files.column("tokens_per_s"), files.column("memory")
    if speeds:
        found.append(("tokens a second, median", f"{statistics.median(value for _, value in speeds):,.0f}"))
    if memory:
        found.append(("measured peak memory", show_bytes(int(memory[-1][1]))))
    return found


def _facts(files: RunFiles) -> str:
    recipe, identity = files.recipe, files.manifest.get("identity", {})
    adapter = recipe.adapter
    done = files.steps[-1]["step"] if files.steps else 0
    bad = files.steps[-1].get("bad_steps", 0) if files.steps else 0
    rows: list[tuple[str, object]] = [
        ("base", _short(recipe.base.model)),
        ("quantisation", f"{recipe.base.quantization}{', doubly' if recipe.base.double_quant else ''}"),
        ("method", adapter.method),
        ("rank, alpha", f"{adapter.rank}, {adapter.alpha}"),
        ("targets", adapter.targets if isinstance(adapter.targets, str) else ", ".join(adapter.targets or ())),
        ("steps done", f"{done:,}" + (f", of which {bad} not finite and skipped" if bad else "")),
        ("rows a step", recipe.train.global_batch),
        ("learning rate", f"{recipe.train.learning_rate:g}, {recipe.train.schedule}, {recipe.train.optimizer}"),
        ("device", files.manifest.get("device", "unknown")),
        ("seed", recipe.train.seed),
    ]
    versions = [
        (name.removeprefix("versions."), value) for name, value in identity.items() if name.startswith("versions.")
    ]
    changes = [
        (f"from step {change['step']}", ", ".join(change["changed"])) for change in files.manifest.get("lineage", [])
    ]
    return grid([card("what was trained", facts(rows)), card("versions", facts([*versions, *changes]))]) + folded(
        "the whole recipe", f"<pre>{escape(recipe.dump_yaml())}</pre>"
    )


def _short(model: str) -> str:
    """Return a hub id as it is, and the end of a folder's path: the recipe tells it whole."""
    return "/".join(Path(model).parts[-2:])


def _curves(files: RunFiles) -> str:
    loss = files.column("loss")
    tasks = [task.name for task in files.recipe.data.tasks]
    held_out = [
        Series(task, points, number, has_dots=len(points) < 40)
        for number, task in enumerate(tasks)
        if (points := files.evaluated("eval_loss", task))
    ]
    if not loss:
        return paragraph("No step has been logged yet.")
    losses = [Series("each step", loss, 0, is_faint=True), Series("mean of neighbours", smoothed(loss), 0)]
    scored = [
        Series(task, points, number, has_dots=True)
        for number, task in enumerate(tasks)
        if (points := files.evaluated("eval_score", task))
    ]
    rate = Series("learning rate", files.column("learning_rate"), 0)
    norms = files.column("grad_norm")
    speed = files.column("tokens_per_s")
    nats = "nats a labelled token"
    curves = [
        ("training loss", line_chart("training loss", losses, is_log=True), f"{nats}; faint: each step"),
        ("held-out loss by task", line_chart("held-out loss by task", held_out, is_log=True), nats),
        ("learning rate", line_chart("learning rate", [rate], low=0.0), ""),
        ("gradient norm", _single("gradient norm", norms, is_log=True), "before clipping; faint: each step"),
        ("tokens a second", _single("tokens a second", speed), "faint: each step"),
    ]
    if scored:
        curves.insert(2, ("scores by task", line_chart("scores by task", scored, low=0.0), "of the task's own metric"))
    return grid(card(title, chart, note) for title, chart, note in curves)


def _single(name: str, points: list[tuple[float, float]], *, is_log: bool = False) -> str:
    """Return one number's curve: what was measured, faint, and its mean over neighbours."""
    lines = [Series(name, points, 0, is_faint=True), Series(name, smoothed(points), 0)]
    return line_chart(name, lines, is_log=True) if is_log else line_chart(name, lines, low=0.0)


def _memory(files: RunFiles) -> str:
    plan, measured = files.manifest.get("plan", {}), files.column("memory")
    items = plan.get("items", {})
    if not items:
        return paragraph("No plan in the run's manifest.")
    peak, most = plan["peak_bytes"], int(measured[-1][1]) if measured else 0
    whole = max(peak, most)

    def row(name: str, size: int, kind: str = "") -> list[str]:
        bar = f'<span class="bar {kind}" style="width:{100 * size / whole:.1f}%"></span>'
        return [
            escape(name),
            escape(show_bytes(size)).replace(" ", "&nbsp;"),
            f'<div style="min-width:72px">{bar}</div>',
        ]

    rows = [row(name, size) for name, size in sorted(items.items(), key=lambda item: -item[1])]
    rows.append(row("planned peak", peak))
    rows += [row("measured peak", most, "other")] if most else []
    note = "the items are alive at the planned peak and sum up to it"
    if files.manifest.get("device") == "cpu":
        note += "; on a CPU what is measured is the whole process, with Python and its libraries"
    chosen = [
        [escape(name), escape(choice["value"]), escape(choice["reason"])]
        for name, choice in plan.get("choices", {}).items()
    ]
    choices = (
        table(("chosen", "value", "why"), chosen)
        .replace("<td>", '<td class="left">')
        .replace("<th ", '<th class="left" ')
    )
    return grid(
        [card("planned and measured", table(("item", "memory", ""), rows), note), card("what was chosen", choices)]
    )


def _scores(files: RunFiles) -> str:
    models = [name for name in files.scores if _mean_score(files.scores, name) is not None]
    if not models:
        return paragraph("Not scored: `finish.score: true` in the recipe, or `qd2mora eval`.")
    tasks = list(dict.fromkeys(task for model in models for task in files.scores[model]))
    rows = [[escape(task), *(_score(files.scores[model].get(task)) for model in models)] for task in tasks]
    metrics = {str(score.get("metric", "exact")) for model in models for score in files.scores[model].values()}
    if len(metrics) == 1:
        means = [_mean_score(files.scores, model) or 0.0 for model in models]
        rows.append(["mean", *(f"{mean:.4f}" if "loss" in metrics else f"{mean:.1%}" for mean in means)])
    note = f"{', '.join(sorted(WORDS.get(metric, metric) for metric in metrics))} on held-out rows, with 95% intervals"
    return card("scores by task", table(("task", *models), rows, last_is_sum=len(metrics) == 1), note)


def _score(score: dict[str, Any] | None) -> str:
    if score is None:
        return ""
    low, high = score["interval"]
    if score.get("metric") == "loss":
        return f"{score['score']:.4f} <small>({low:.3f} to {high:.3f})</small>"
    return f"{_value(score):.1%} <small>({low:.0%} to {high:.0%})</small>"


def _value(score: dict[str, Any]) -> float:
    return float(score["score"] if "score" in score else score["accuracy"])


def _mean_score(scores: dict[str, Any], model: str) -> float | None:
    """Return the mean over tasks; None where the file holds no such scores."""
    by_task = scores.get(model)
    if not isinstance(by_task, dict) or not by_task:
        return None
    try:
        return sum(_value(score) for score in by_task.values()) / len(by_task)
    except (KeyError, TypeError, ValueError):
        return None


def _export(files: RunFiles) -> str:
    report = files.export
    if not report:
        return paragraph("No export in the run folder; `qd2mora merge` makes one and measures it.")
    rows: list[tuple[str, object]] = [
        (
            "strategy",
            f"{report.get('strategy')}, {'exact up to rounding' if report.get('exact') else 'an approximation'}",
        )
    ]
    if isinstance(report.get("loss"), dict):
        rows += [(f"held-out loss, {name}", f"{value:.4f}") for name, value in report["loss"].items()]
    if isinstance(report.get("gain_kept"), int | float):
        rows.append(("share of the gain kept", f"{report['gain_kept']:.1%}"))
    if isinstance(report.get("kl_per_token"), int | float):
        rows.append(("KL from the routed adapter", f"{report['kl_per_token']:.4f} nats a token"))
    cards = [card("what the export keeps", facts(rows))]
    modules = report.get("modules", {})
    if modules and not report.get("exact"):
        worst = sorted(modules.items(), key=lambda item: -item[1]["unexplained"])[:10]
        lines = [[escape(name.removeprefix("model.layers.")), f"{each['unexplained']:.2%}"] for name, each in worst]
        note = "share of the adapter's output in a linear that no static weights of this strategy give"
        cards.append(card("linears that lose most", table(("linear", "unexplained"), lines), note))
    return grid(cards)


def _samples(files: RunFiles) -> str:
    if not files.samples:
        return paragraph("No samples: a run that is scored at its end keeps some.")
    cards = []
    for sample in files.samples:
        answers = {"right": sample["right"], **sample["answers"]}
        cards.append(card(str(sample["task"]), f"<pre>{escape(sample['prompt'])}</pre>{facts(answers.items())}"))
    return grid(cards)


def _mean_loss(files: RunFiles, place: int) -> float | None:
    found = [line["eval_loss"] for line in files.evaluations if line.get("eval_loss")]
    values = [value for value in found[place].values() if value is not None] if found else []
    return sum(values) / len(values) if values else None


SECTIONS: dict[str, Callable[[RunFiles], str]] = {
    "Run": lambda files: tiles(_main_numbers(files)) + _facts(files),
    "Training": _curves,
    "Memory": _memory,
    "Scores": _scores,
    "Export": _export,
    "Routing": routing_section,
    "Experts": experts_section,
    "Samples": _samples,
}

__all__ = ["run_page", "write_page"]
