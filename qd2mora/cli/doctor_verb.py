"""The verb that looks at the machine."""

import json
from pathlib import Path
from typing import Annotated

import typer

from qd2mora.cli.app import AsJson, app


@app.command()
def doctor(
    folder: Annotated[Path, typer.Argument(help="A folder on the disk that runs go to.")] = Path(),
    as_json: AsJson = False,
) -> None:
    """Say what a run will use of this machine, and what it will not: card, arithmetic, kernels, memory, disk."""
    from rich.table import Table
    from rich.text import Text

    from qd2mora.inspection import machine_check
    from qd2mora.terminal import Screen

    facts = machine_check.check_machine(folder)
    if as_json:
        typer.echo(json.dumps(machine_check.as_json(facts), indent=1))
        return
    table = Table(show_edge=False)
    for heading in ("looked at", "found", "for a run"):
        table.add_column(heading)
    for fact in facts:
        style = "bold red" if fact.is_problem else ""
        table.add_row(*(Text(words) for words in (fact.topic, fact.found, fact.meaning)), style=style)
    Screen().print(table)


__all__ = ["doctor"]
