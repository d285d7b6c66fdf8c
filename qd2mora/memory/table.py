"""A plan for people to read."""

from rich.console import Group
from rich.table import Table
from rich.text import Text

from qd2mora.memory.plan import Plan

MIB, GIB = 1 << 20, 1 << 30
BAR_WIDTH = 24


def render(planned: Plan) -> Group:
    """Return the items with a bar each, the peak against the budget, the choices with reasons, and ways out."""
    # As text: brackets of a list are not markup.
    ways = (Text(f"way out: {words}") for words in planned.ways_out)
    return Group(_items(planned), "", _choices(planned), *ways)


def show_bytes(size: int) -> str:
    """Return a size as MiB, or GiB from 1 GiB on."""
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / MIB:.1f} MiB"


def _items(planned: Plan) -> Table:
    title = f"planned for {planned.device}; {planned.trainable_parameters:,} trainable parameters"
    table = Table(title=title, show_edge=False)
    table.add_column("item")
    table.add_column("memory", justify="right")
    table.add_column("share of the peak")
    for name, size in planned.items.items():
        table.add_row(name, show_bytes(size), "█" * round(BAR_WIDTH * size / planned.peak_bytes))
    for name, size in planned.elsewhere.items():
        table.add_row(name, show_bytes(size), "at another moment", style="dim")
    for name, size in planned.host.items():
        table.add_row(name, show_bytes(size), "host memory", style="dim")
    table.add_section()
    table.add_row("peak", show_bytes(planned.peak_bytes), _verdict(planned), style="bold")
    return table


def _verdict(planned: Plan) -> str:
    if planned.budget_bytes is None:
        return "no budget"
    reserve = f"{show_bytes(planned.reserve_bytes)} in reserve"
    room = f"the budget of {show_bytes(planned.budget_bytes)}"
    if "free" in planned.budget_source:
        room = f"{planned.budget_source}, {show_bytes(planned.budget_bytes)}"
    if planned.fits:
        return f"fits {room}, {reserve}"
    return f"does not fit {room} with {reserve}: {show_bytes(planned.shortfall_bytes)} short"


def _choices(planned: Plan) -> Table:
    table = Table(show_edge=False)
    for heading in ("chosen", "value", "why"):
        table.add_column(heading)
    for key, choice in planned.choices.items():
        table.add_row(key, Text(str(choice.value)), Text(choice.reason))
    return table


__all__ = ["render", "show_bytes"]
