"""Verbs that list what there is: methods, recipes."""

from pathlib import Path
from typing import Annotated

import typer

from qd2mora.cli.app import app
from qd2mora.errors import InputRefused, nearest
from qd2mora.redact import redacted
from qd2mora.terminal import Screen


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="One method in full.")] = None,
    taxonomy: Annotated[bool, typer.Option("--taxonomy", help="By the words of the field's survey.")] = False,
) -> None:
    """List the methods; with a name, its equation, defaults and source."""
    from qd2mora.report import show_methods, show_taxonomy

    if taxonomy and name is not None:
        raise InputRefused(f"--taxonomy: is of all methods; leave out '{name}', or the option")
    if taxonomy:
        show_taxonomy(Screen())
        return
    show_methods(name, Screen())


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe; with --from, the file to translate.")] = None,
    neighbour: Annotated[
        str | None, typer.Option("--from", help="Translate a file of axolotl or llama-factory.", metavar="NEIGHBOUR")
    ] = None,
) -> None:
    """List the recipes that come along; with a name, print one: `qd2mora recipes quickstart > my.yaml`.

    With --from, print a neighbour's training file as a recipe, and on standard error all that has no place in it.
    """
    if neighbour is not None:
        _translate(neighbour, name)
        return
    from qd2mora.recipe.shipped import copied_recipe, shipped_recipes

    found = shipped_recipes()
    if name is None:
        for each, path in sorted(found.items()):
            typer.echo(f"{each:32} {path.read_text(encoding='utf-8').splitlines()[0].removeprefix('# ')}")
        return
    if name not in found:
        raise InputRefused(f"no recipe '{name}'; {nearest(name, sorted(found))}")
    typer.echo(copied_recipe(found[name]), nl=False)


def _translate(neighbour: str, file: str | None) -> None:
    """Print a neighbour's file as a recipe. Raises InputRefused."""
    from qd2mora.recipe.axolotl import AXOLOTL
    from qd2mora.recipe.llama_factory import LLAMA_FACTORY
    from qd2mora.recipe.translation import translate
    from qd2mora.recipe.yaml_file import dump_yaml, read_mapping

    known = {"axolotl": AXOLOTL, "llama-factory": LLAMA_FACTORY}
    if neighbour not in known:
        raise InputRefused(f"--from: unknown '{neighbour}'; {nearest(neighbour, known)}")
    if file is None:
        raise InputRefused(f"--from {neighbour}: name the file to translate")
    path = Path(file)
    found = translate(known[neighbour], read_mapping(path), path.parent)
    typer.echo(dump_yaml(found.content), nl=False)
    for line in found.left:
        typer.echo(redacted(f"not translated: {' '.join(line.split())}"), err=True)


__all__ = ["methods", "recipes"]
