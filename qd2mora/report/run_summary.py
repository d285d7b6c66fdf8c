"""A run on the screen: how it went, who routed where in few numbers, how alike experts are, what is wrong."""

from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qd2mora.inspection.measures import mean_of_known
from qd2mora.inspection.routing_report import BankReport, RouterReport
from qd2mora.report.cells import clock_time, grouped, with_columns, written
from qd2mora.report.run_contents import RunContents

NUM_WORST = 5
MOST_LOADS = 8


def show_inspection(run: RunContents, page: Path, console: Console) -> None:
    """Print the summary of a run, and where its page lies."""
    _say(console, _headline(run))
    routing = run.routing
    if routing is None:
        _say(console, "no routing report yet: the run has no finished adapter")
    elif routing.note:
        _say(console, routing.note)
    else:
        console.print(_by_linear(routing.routers))
        console.print(_worst(routing.routers))
    if routing is not None and routing.banks:
        console.print(_banks(routing.banks))
    if run.alarm:
        _say(console, f"warning: {run.alarm}")
    if run.advice:
        _say(console, f"note: {run.advice}")
    for name in run.damaged:
        _say(console, f"warning: {name} is damaged and was left out")
    _say(console, f"report       {page}")


def _say(console: Console, line: str) -> None:
    console.print(Text(line), soft_wrap=True)


def _headline(run: RunContents) -> str:
    words = [f"{run.name}: {run.recipe.adapter.method} on {run.recipe.base.model}"]
    if run.steps:
        took = f" in {clock_time(run.training_s)}" if run.training_s is not None else ""
        words.append(f"{run.steps[-1].step} steps{took}")
    losses = run.mean_losses()
    if losses:
        words.append(f"mean held-out loss {losses[0]:.4f} to {losses[-1]:.4f}")
    return ", ".join(words)


def _by_linear(routers: list[RouterReport]) -> Table:
    """One row a kind of linear and role, means over layers."""
    headings = ("entropy", "mean gate's", "in use", "most", "least", "dead", "info")
    table = _table("routing, means over layers (most, least: of any layer)", "linear", "gate", *headings)
    for (kind, role), group in grouped(routers, lambda each: (each.kind, each.role)).items():
        measures = [each.measures for each in group]
        table.add_row(
            Text(kind),
            role,
            written(mean_of_known(each.entropy for each in measures)),
            written(mean_of_known(each.entropy_of_mean for each in measures)),
            f"{mean_of_known(each.effective_experts for each in measures):.2f}/{max(each.experts for each in group)}",
            f"{max(each.measures.max_load / each.experts for each in group):.0%}",
            f"{min(each.measures.min_load / each.experts for each in group):.1%}",
            str(sum(len(each.dead) for each in measures)),
            written(mean_of_known(each.mutual_information for each in measures)),
        )
    return table


def _worst(routers: list[RouterReport]) -> Table:
    """Those whose experts are used least evenly."""
    table = _table("least even routers", "router", "gate", "in use", "load of each expert")
    several = [router for router in routers if router.experts > 1]
    for router in sorted(several, key=lambda each: each.evenness)[:NUM_WORST]:
        measures = router.measures
        if router.experts <= MOST_LOADS:
            loads, more = measures.load, ""
        else:
            loads, more = sorted(measures.load, reverse=True)[:MOST_LOADS], " ..."
        shown = " ".join(f"{share:.0%}" for share in loads) + more
        in_use = f"{measures.effective_experts:.2f}/{router.experts}"
        table.add_row(Text(router.module.removeprefix("model.layers.")), router.role, in_use, shown)
    return table


def _banks(banks: list[BankReport]) -> Table:
    headings = ("|cos|", "overlap", "angle", "effective rank")
    table = _table("likeness of experts, means over layers", "linear", "bank", *headings)
    for (kind, bank), group in grouped(banks, lambda each: (each.kind, each.bank)).items():
        measures = [each.measures for each in group]
        table.add_row(
            Text(kind),
            bank,
            written(mean_of_known(each.mean_cosine for each in measures)),
            written(mean_of_known(each.mean_overlap for each in measures)),
            written(mean_of_known(each.mean_angle for each in measures), ".0f"),
            written(mean_of_known(each.effective_rank for each in measures), ".1f"),
        )
    return table


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE, padding=(0, 1, 0, 0))
    return with_columns(table, headings, words=headings[:2])


__all__ = ["show_inspection"]
