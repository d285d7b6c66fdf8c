"""The verb that chooses adapters from a bank and rows from a pool by a few labelled rows: select."""

from pathlib import Path
from typing import Annotated

import typer

from qd2mora.cli.app import MOST, RecipePath, app
from qd2mora.errors import InputRefused
from qd2mora.stopping import listening


@app.command()
def select(
    recipe: RecipePath,
    bank: Annotated[Path, typer.Option(help="Folder whose folders hold LoRAs or runs.", show_default=False)],
    pool: Annotated[
        Path | None, typer.Option(help="File of rows, in the first task's format, to pick like ones from.")
    ] = None,
    keep: Annotated[int, typer.Option(help="Adapters to choose at most.", min=1, max=64)] = 4,
    rows: Annotated[int, typer.Option(help="Rows to pick from the pool at most.", min=1, max=MOST)] = 200,
    likeness: Annotated[float, typer.Option(help="What likeness of two updates costs, beside scores of 0 to 2.")] = 1.0,
    out: Annotated[Path | None, typer.Option(help="New recipe that mixes them; else RECIPE-rocket.yaml.")] = None,
) -> None:
    """Choose LoRAs of a bank by the recipe's few labelled rows, and write the recipe that mixes and trains them."""
    from qd2mora.composition.selection import SelectOptions
    from qd2mora.composition.selection import select as run_selection
    from qd2mora.recipe import load_recipe

    if not 0 <= likeness < float("inf"):
        raise InputRefused(f"--likeness: {likeness} will not do: a number, at least 0")
    out = out or recipe.with_name(f"{recipe.stem}-rocket.yaml")
    with listening("nothing is written before all is scored, run the command again"):
        found = run_selection(load_recipe(recipe), SelectOptions(bank, pool, keep, rows, likeness), out)
    typer.echo(f"scored on {found.shots} rows; the base alone: {found.base.line}")
    for number, candidate in enumerate(found.candidates):
        verdict = "chosen" if number in found.chosen.numbers else f"left out, {found.chosen.left_out[number]}"
        typer.echo(f"{candidate.folder}: {candidate.line}: {verdict}")
    for name, why in found.unread.items():
        typer.echo(f"{name}: not scored, {why}", err=True)
    if pool is not None:
        typer.echo(f"{found.picked} rows of {pool} are near the labelled ones and new")
    typer.echo(f"{out}: `qd2mora train {out}` mixes {len(found.folders)} adapters")


__all__ = ["select"]
