"""The verb that makes the vectors of rows out of what was before them: histories."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from qd2mora.cli.app import MOST, RecipePath, app
from qd2mora.cli.groups import grouped
from qd2mora.stopping import listening


@dataclass(frozen=True)
class VectorOptions:
    """What is read of a row, and what is made of it."""

    field: Annotated[str, typer.Option(help="The field that holds the list.")] = "history"
    query: Annotated[str, typer.Option(help="The field that holds what is asked.")] = "instruction"
    width: Annotated[int, typer.Option(help="Numbers of a vector.", min=1, max=MOST)] = 16
    long: Annotated[int, typer.Option(help="Items nearest to what is asked.", min=1, max=MOST)] = 8
    short: Annotated[int, typer.Option(help="Latest items.", min=1, max=MOST)] = 4
    basis: Annotated[Path | None, typer.Option(help="Directions of an earlier file, for rows that came later.")] = None


@app.command()
@grouped
def histories(
    recipe: RecipePath,
    rows: Annotated[Path, typer.Argument(help="File of rows, each with a list of texts, the oldest first.")],
    out: Annotated[Path, typer.Option(help="New file for the rows with their vectors.", show_default=False)],
    vector: VectorOptions,
) -> None:
    """Make a vector of each row's history, by which `reclora` mixes its experts for it."""
    from qd2mora.composition.histories import HistoryOptions
    from qd2mora.composition.histories import histories as run_histories
    from qd2mora.recipe import load_recipe

    options = HistoryOptions(**asdict(vector))
    with listening("nothing is written before all is read, run the command again"):
        found = run_histories(load_recipe(recipe), rows, options, out)
    spread = "" if found.kept is None else f", {found.kept:.0%} of what histories differ in"
    empty = f"; {found.empty} without a history have zeros" if found.empty else ""
    typer.echo(f"{out}: {found.rows} rows with vectors of {found.width} numbers{spread}{empty}")
    typer.echo(f"{found.basis}: their directions, for later rows (--basis)")
    typer.echo(f"train with adapter.method=reclora adapter.external_width={found.width} data.tasks.0.vector=vector")


__all__ = ["histories"]
