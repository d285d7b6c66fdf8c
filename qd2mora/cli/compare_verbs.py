"""Verbs that weigh methods against each other: compare."""

import json
from pathlib import Path
from typing import Annotated, get_args

import typer

from qd2mora.cli.app import MOST, AsJson, Overrides, RecipePath, app, words
from qd2mora.comparison.settings import ComparisonSettings, Linears
from qd2mora.errors import InputRefused
from qd2mora.recipe.yaml_file import parse_yaml
from qd2mora.stopping import listening
from qd2mora.terminal import Screen

Methods = Annotated[str | None, typer.Option(help="With commas; the first is what the others are compared with.")]
Seeds = Annotated[int, typer.Option(help="Runs of each method; 0: the sweep alone.", min=0, max=MOST)]
Sweep = Annotated[str | None, typer.Option(help="Rates to try, or none; else thirds and thrice.")]
SweepSteps = Annotated[int | None, typer.Option(help="Steps of a run of the sweep.", min=1, max=MOST)]
Tries = Annotated[int | None, typer.Option(help="Settings tried a method, ever fewer for longer.", min=2, max=MOST)]
Space = Annotated[str | None, typer.Option(help="Swept besides the rate: {up: [1, 16], alpha: [1, 2]}.")]
Arms = Annotated[Path | None, typer.Option(help="File of arms: methods with settings, by name.")]
Targets = Annotated[str, typer.Option(help="Linears: each method's own, or the recipe's for all.")]
EqualTime = Annotated[bool, typer.Option("--equal-time", help="A second table: all trained as long as the first.")]
Minutes = Annotated[float | None, typer.Option(help="Time for all training; steps follow from it.", min=0, max=MOST)]
ChooseRows = Annotated[int, typer.Option(help="Rows a task to choose rate and export by.", min=1, max=MOST)]
Strategies = Annotated[str | None, typer.Option(help="Exports to try, with commas; all where left out.")]
WithExport = Annotated[bool, typer.Option(help="Score the best static export too.")]
Suite = Annotated[str | None, typer.Option(help="Test on a published suite: commonsense.")]
SuiteData = Annotated[Path | None, typer.Option(help="Folder of the suite's test files.")]
SuiteTasks = Annotated[str | None, typer.Option(help="Tasks of the suite, with commas; all where left out.")]
Scoring = Annotated[str, typer.Option(help="Of the suite: generate or likelihood.")]
Prompt = Annotated[str, typer.Option(help="Of the suite: published, training's own, or cloze.")]
Limit = Annotated[int | None, typer.Option(help="Test rows of each task.", min=1, max=MOST)]
Out = Annotated[Path | None, typer.Option(help="Folder; the recipe's output and -compare where left out.")]
PlanOnly = Annotated[bool, typer.Option("--plan", help="Say what would be done and how long it may take, no more.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier comparison.")]


@app.command()
def compare(
    recipe: RecipePath,
    overrides: Overrides = None,
    methods: Methods = None,
    arms: Arms = None,
    targets: Targets = ComparisonSettings.targets,
    seeds: Seeds = ComparisonSettings.seeds,
    sweep: Sweep = None,
    sweep_steps: SweepSteps = ComparisonSettings.sweep_steps,
    tries: Tries = None,
    space: Space = None,
    minutes: Minutes = ComparisonSettings.minutes,
    choose_rows: ChooseRows = ComparisonSettings.choose_rows,
    strategies: Strategies = None,
    export: WithExport = ComparisonSettings.export,
    suite: Suite = ComparisonSettings.suite,
    data: SuiteData = None,
    tasks: SuiteTasks = None,
    scoring: Scoring = ComparisonSettings.scoring,
    prompt: Prompt = ComparisonSettings.prompt,
    equal_time: EqualTime = False,
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
        from qd2mora.comparison.arms_file import read_arms
        from qd2mora.comparison.running import compare as run_comparison
        from qd2mora.comparison.tables import show, write_tables

        if targets not in get_args(Linears):
            raise InputRefused(f"--targets: '{targets}' will not do: own or recipe")
        wishes = read_arms(arms, loaded) if arms is not None else {}
        settings = ComparisonSettings(
            methods=words(methods) or tuple(wishes) or ComparisonSettings.methods,
            targets="recipe" if targets == "recipe" else "own",
            space=_space(space),
            tries=tries,
            equal_time=equal_time,
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
            prompt=prompt,
        )
        if plan:
            from qd2mora.comparison.forecast import forecast

            for line in forecast(loaded, settings, wishes, is_asked=True):
                console.print(line, soft_wrap=True, highlight=False)
            return
        found = run_comparison(
            loaded,
            settings,
            folder,
            wishes=wishes,
            overwrite=overwrite,
            say=lambda line: console.print(line, soft_wrap=True),
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


def _space(text: str | None) -> dict[str, tuple[float, ...]]:
    if text is None:
        return {}
    from qd2mora.comparison.tuning import checked_space

    content = parse_yaml(text, "--space")
    if not isinstance(content, dict):
        raise InputRefused(f"--space: '{text}' will not do: write {{up: [1, 16], router: [1, 4]}}")
    return checked_space(content, "--space")


__all__ = ["compare"]
