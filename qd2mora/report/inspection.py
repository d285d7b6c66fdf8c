"""A look at a run on the screen: how it went, who routed where in few numbers, how alike experts are, what is wrong."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qd2mora.report.run_files import RunFiles

NUM_WORST = 5


def show_inspection(files: RunFiles, page: Path, console: Console) -> None:
    """Print the summary of a run, and where its page lies."""
    _say(console, _headline(files))
    content = files.routing
    if content is None:
        _say(console, "no routing report yet: the run has no finished adapter")
    elif content["note"]:
        _say(console, content["note"])
    else:
        console.print(_by_linear(content["routers"]))
        console.print(_worst(content["routers"]))
    if content is not None and content["banks"]:
        console.print(_banks(content["banks"]))
    if files.alarm:
        _say(console, f"warning: {files.alarm}")
    for name in files.damaged:
        _say(console, f"warning: {name} is damaged and was left out")
    _say(console, f"report       {page}")


def _say(console: Console, line: str) -> None:
    console.print(Text(line), soft_wrap=True)


def _headline(files: RunFiles) -> str:
    words = [f"{files.name}: {files.recipe.adapter.method} on {files.recipe.base.model}"]
    if files.steps:
        words.append(f"{files.steps[-1]['step']} steps")
    losses = [line["eval_loss"] for line in files.evaluations if line.get("eval_loss")]
    means = [_mean(each.values()) for each in losses]
    known = [mean for mean in means if mean is not None]
    if known:
        words.append(f"mean held-out loss {known[0]:.4f} to {known[-1]:.4f}")
    return ", ".join(words)


def _by_linear(routers: list[dict[str, Any]]) -> Table:
    """One row a kind of linear and role, means over layers."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for router in routers:
        groups.setdefault((router["kind"], router["role"]), []).append(router)
    headings = ("entropy", "mean gate's", "in use", "most", "least", "dead", "info")
    table = _table("routing, means over layers (most, least: of any layer)", "linear", "gate", *headings)
    for (kind, role), group in groups.items():
        table.add_row(
            Text(kind),
            role,
            _number(_mean(each["entropy"] for each in group)),
            _number(_mean(each["entropy_of_mean"] for each in group)),
            f"{_mean(each['effective_experts'] for each in group):.2f}/{max(each['experts'] for each in group)}",
            f"{max(each['max_load'] / each['experts'] for each in group):.0%}",
            f"{min(each['min_load'] / each['experts'] for each in group):.1%}",
            str(sum(len(each["dead"]) for each in group)),
            _number(_mean(each["mutual_information"] for each in group)),
        )
    return table


def _worst(routers: list[dict[str, Any]]) -> Table:
    """Those whose experts are used least evenly."""
    table = _table("least even routers", "router", "gate", "in use", "load of each expert")
    several = [router for router in routers if router["experts"] > 1]
    for router in sorted(several, key=lambda each: each["effective_experts"] / each["experts"])[:NUM_WORST]:
        loads = router["load"] if router["experts"] <= 8 else sorted(router["load"], reverse=True)[:8]
        shown = " ".join(f"{share:.0%}" for share in loads) + ("" if router["experts"] <= 8 else " ...")
        in_use = f"{router['effective_experts']:.2f}/{router['experts']}"
        table.add_row(Text(router["module"].removeprefix("model.layers.")), router["role"], in_use, shown)
    return table


def _banks(banks: list[dict[str, Any]]) -> Table:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for bank in banks:
        groups.setdefault((bank["kind"], bank["bank"]), []).append(bank)
    headings = ("|cos|", "overlap", "angle", "effective rank")
    table = _table("likeness of experts, means over layers", "linear", "bank", *headings)
    for (kind, side), group in groups.items():
        names = ("mean_cosine", "mean_overlap", "mean_angle", "effective_rank")
        cosine, overlap, angle, rank = (_mean(each[name] for each in group) for name in names)
        table.add_row(Text(kind), side, _number(cosine), _number(overlap), _number(angle, ".0f"), _number(rank, ".1f"))
    return table


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE, padding=(0, 1, 0, 0))
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number < 2 else "right")
    return table


def _number(value: float | None, form: str = ".3f") -> str:
    return "" if value is None else format(value, form)


def _mean(values: Iterable[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


__all__ = ["show_inspection"]
