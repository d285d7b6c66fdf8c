"""Verbs that list what there is: methods, recipes."""

from typing import Annotated

import typer

from qd2mora.cli.app import app
from qd2mora.errors import InputRefused, nearest
from qd2mora.terminal import Screen


@app.command()
def methods(name: Annotated[str | None, typer.Argument(help="One method in full.")] = None) -> None:
    """List the methods; with a name, its equation, defaults and source."""
    from qd2mora.report import show_methods

    show_methods(name, Screen())


@app.command()
def recipes(name: Annotated[str | None, typer.Argument(help="Print this recipe.")] = None) -> None:
    """List the recipes that come along; with a name, print one: `qd2mora recipes quickstart > my.yaml`."""
    from qd2mora.recipe.shipped import copied_recipe, shipped_recipes

    found = shipped_recipes()
    if name is None:
        for each, path in sorted(found.items()):
            typer.echo(f"{each:32} {path.read_text(encoding='utf-8').splitlines()[0].removeprefix('# ')}")
        return
    if name not in found:
        raise InputRefused(f"no recipe '{name}'; {nearest(name, sorted(found))}")
    typer.echo(copied_recipe(found[name]), nl=False)


__all__ = ["methods", "recipes"]
