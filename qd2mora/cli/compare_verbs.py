"""Verbs that weigh methods against each other: compare."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from qd2mora.cli.app import Overrides, RecipePath, app
from qd2mora.errors import InputRefused
from qd2mora.stopping import listening


@app.command()
def compare(
    recipe: RecipePath,
    overrides: Overrides = None,
    methods: Annotated[str, typer.Option(help="With commas; the first is what the others are compared with.")] = (
        "d2mora,lora,hydralora"
    ),
    seeds: Annotated[int, typer.Option(help="Runs of each method; 0: the sweep alone.", min=0)] = 3,
    sweep: Annotated[str | None, typer.Option(help="Rates to try, or none; else thirds and thrice.")] = None,
    sweep_steps: Annotated[int | None, typer.Option(help="Steps of a run of the sweep.", min=1)] = None,
    minutes: Annotated[float | None, typer.Option(help="Time for all training; steps follow from it.", min=0)] = None,
    choose_rows: Annotated[int, typer.Option(help="Rows a task to choose rate and export by.", min=1)] = 100,
    strategies: Annotated[str | None, typer.Option(help="Exports to try, with commas; all where left out.")] = None,
    export: Annotated[bool, typer.Option(help="Score the best static export too.")] = True,
    suite: Annotated[str | None, typer.Option(help="Test on a published suite: commonsense.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of the suite's test files.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks of the suite, with commas; all where left out.")] = None,
    scoring: Annotated[str, typer.Option(help="Of the suite: generate or likelihood.")] = "generate",
    limit: Annotated[int | None, typer.Option(help="Test rows of each task.", min=1)] = None,
    out: Annotated[Path | None, typer.Option(help="Folder; the recipe's output and -compare where left out.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier comparison.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare methods of equal size on the same rows, each at its best rate; the same command goes on after a kill."""
    from qd2mora.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    folder = out or Path(f"{loaded.output}-compare")
    with listening():
        from qd2mora.comparison import Wishes
        from qd2mora.comparison import compare as run_comparison
        from qd2mora.comparison.show import draw, markdown, show
        from qd2mora.disk.durable import write_atomically

        wishes = Wishes(
            methods=_words(methods),
            seeds=seeds,
            rates=_rates(sweep, loaded.train.learning_rate),
            sweep_steps=sweep_steps,
            minutes=minutes,
            choose_rows=choose_rows,
            strategies=_words(strategies or ""),
            export=export,
            limit=limit,
            suite=suite,
            data=None if data is None else str(data.resolve()),
            tasks=_words(tasks or ""),
            scoring=scoring,
        )
        console = Console()
        found = run_comparison(
            loaded, wishes, folder, overwrite=overwrite, say=lambda line: console.print(line, soft_wrap=True)
        )
        write_atomically(folder / "compare.md", markdown(found))
        has_figure = draw(found, folder / "compare.png")
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=1))
        return
    show(found, console)
    names = "compare.json, compare.md" + (", compare.png" if has_figure else "")
    console.print(f"{names} in {folder}", highlight=False, soft_wrap=True)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _rates(text: str | None, own: float) -> tuple[float, ...]:
    if text is None:
        return tuple(float(f"{own * factor:.2g}") for factor in (1 / 3, 1, 3))
    if text == "none":
        return (own,)
    try:
        rates = tuple(float(word) for word in _words(text))
    except ValueError:
        rates = ()
    if not rates or not all(0 < rate < float("inf") for rate in rates):
        raise InputRefused(f"--sweep: '{text}' will not do: learning rates with commas, for example 1e-4,3e-4,1e-3")
    return rates


__all__ = ["compare"]
