"""Verbs that weigh methods against each other: compare."""

import json
from pathlib import Path
from typing import Annotated

import typer

from qd2mora.cli.app import MOST, AsJson, Overrides, RecipePath, app, words
from qd2mora.comparison.settings import ComparisonSettings
from qd2mora.errors import InputRefused
from qd2mora.stopping import listening
from qd2mora.terminal import Screen

USUAL_METHODS = ",".join(ComparisonSettings.methods)
Methods = Annotated[str, typer.Option(help="With commas; the first is what the others are compared with.")]
Seeds = Annotated[int, typer.Option(help="Runs of each method; 0: the sweep alone.", min=0, max=MOST)]
Sweep = Annotated[str | None, typer.Option(help="Rates to try, or none; else thirds and thrice.")]
SweepSteps = Annotated[int | None, typer.Option(help="Steps of a run of the sweep.", min=1, max=MOST)]
Minutes = Annotated[float | None, typer.Option(help="Time for all training; steps follow from it.", min=0, max=MOST)]
ChooseRows = Annotated[int, typer.Option(help="Rows a task to choose rate and export by.", min=1, max=MOST)]
Strategies = Annotated[str | None, typer.Option(help="Exports to try, with commas; all where left out.")]
WithExport = Annotated[bool, typer.Option(help="Score the best static export too.")]
Suite = Annotated[str | None, typer.Option(help="Test on a published suite: commonsense.")]
SuiteData = Annotated[Path | None, typer.Option(help="Folder of the suite's test files.")]
SuiteTasks = Annotated[str | None, typer.Option(help="Tasks of the suite, with commas; all where left out.")]
Scoring = Annotated[str, typer.Option(help="Of the suite: generate or likelihood.")]
Limit = Annotated[int | None, typer.Option(help="Test rows of each task.", min=1, max=MOST)]
Out = Annotated[Path | None, typer.Option(help="Folder; the recipe's output and -compare where left out.")]
PlanOnly = Annotated[bool, typer.Option("--plan", help="Say what would be done and how long it may take, no more.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier comparison.")]


@app.command()
def compare(
    recipe: RecipePath,
    overrides: Overrides = None,
    methods: Methods = USUAL_METHODS,
    seeds: Seeds = ComparisonSettings.seeds,
    sweep: Sweep = None,
    sweep_steps: SweepSteps = ComparisonSettings.sweep_steps,
    minutes: Minutes = ComparisonSettings.minutes,
    choose_rows: ChooseRows = ComparisonSettings.choose_rows,
    strategies: Strategies = None,
    export: WithExport = ComparisonSettings.export,
    suite: Suite = ComparisonSettings.suite,
    data: SuiteData = None,
    tasks: SuiteTasks = None,
    scoring: Scoring = ComparisonSettings.scoring,
    limit: Limit = ComparisonSettings.limit,
    out: Out = None,
    overwrite: Overwrite = False,
    plan: PlanOnly = False,
    as_json: AsJson = False,
) -> None:
    """Compare methods of equal size on the same rows, each at its best rate; the same command goes on after a kill."""
    from qd2mora.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    folder, console = out or Path(f"{loaded.output}-compare"), Screen()
    with listening("what is done is kept, and the same command goes on from there"):
        from qd2mora.comparison.running import compare as run_comparison
        from qd2mora.comparison.tables import show, write_tables

        settings = ComparisonSettings(
            methods=words(methods),
            seeds=seeds,
            rates=_rates(sweep, loaded.train.learning_rate),
            sweep_steps=sweep_steps,
            minutes=minutes,
            choose_rows=choose_rows,
            strategies=words(strategies),
            export=export,
            limit=limit,
            suite=suite,
            data=None if data is None else str(data.resolve()),
            tasks=words(tasks),
            scoring=scoring,
        )
        if plan:
            from qd2mora.comparison.forecast import forecast

            for line in forecast(loaded, settings, is_asked=True):
                console.print(line, soft_wrap=True, highlight=False)
            return
        found = run_comparison(
            loaded, settings, folder, overwrite=overwrite, say=lambda line: console.print(line, soft_wrap=True)
        )
        names = ["compare.json", *write_tables(found, folder)]
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=1))
    else:
        show(found, console)
        console.print(f"{', '.join(names)} in {folder}", highlight=False, soft_wrap=True)


def _rates(text: str | None, own: float) -> tuple[float, ...]:
    if text is None:
        return tuple(float(f"{own * factor:.2g}") for factor in (1 / 3, 1, 3))
    if text == "none":
        return (own,)
    try:
        rates = tuple(float(word) for word in words(text))
    except ValueError:
        rates = ()
    if not rates or not all(0 < rate < float("inf") for rate in rates):
        raise InputRefused(f"--sweep: '{text}' will not do: learning rates with commas, for example 1e-4,3e-4,1e-3")
    return rates


__all__ = ["compare"]
