"""Verbs that weigh methods against each other: compare."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, get_args

import typer

from qd2mora.cli.app import MOST, AsJson, Overrides, RecipePath, app, words
from qd2mora.cli.groups import grouped
from qd2mora.comparison.settings import ComparisonSettings, Linears
from qd2mora.errors import InputRefused
from qd2mora.recipe.yaml_file import parse_yaml
from qd2mora.stopping import listening
from qd2mora.terminal import Screen


@dataclass(frozen=True)
class ArmOptions:
    """What is compared, and how long each is trained."""

    methods: Annotated[
        str | None, typer.Option(help="With commas; the first is what the others are compared with.")
    ] = None
    arms: Annotated[Path | None, typer.Option(help="File of arms: methods with settings, by name.")] = None
    targets: Annotated[str, typer.Option(help="Linears: each method's own, or the recipe's for all.")] = (
        ComparisonSettings.targets
    )
    seeds: Annotated[int, typer.Option(help="Runs of each method; 0: the sweep alone.", min=0, max=MOST)] = (
        ComparisonSettings.seeds
    )
    sweep: Annotated[str | None, typer.Option(help="Rates to try, or none; else thirds and thrice.")] = None
    sweep_steps: Annotated[int | None, typer.Option(help="Steps of a run of the sweep.", min=1, max=MOST)] = (
        ComparisonSettings.sweep_steps
    )
    tries: Annotated[
        int | None, typer.Option(help="Settings tried a method, ever fewer for longer.", min=2, max=MOST)
    ] = None
    space: Annotated[str | None, typer.Option(help="Swept besides the rate: {up: [1, 16], alpha: [1, 2]}.")] = None
    minutes: Annotated[
        float | None, typer.Option(help="Time for all training; steps follow from it.", min=0, max=MOST)
    ] = ComparisonSettings.minutes


@dataclass(frozen=True)
class TrialOptions:
    """What each is chosen and tested by."""

    choose_rows: Annotated[int, typer.Option(help="Rows a task to choose rate and export by.", min=1, max=MOST)] = (
        ComparisonSettings.choose_rows
    )
    strategies: Annotated[str | None, typer.Option(help="Exports to try, with commas; all where left out.")] = None
    export: Annotated[bool, typer.Option(help="Score the best static export too.")] = ComparisonSettings.export
    suite: Annotated[str | None, typer.Option(help="Test on a published suite: commonsense.")] = (
        ComparisonSettings.suite
    )
    data: Annotated[Path | None, typer.Option(help="Folder of the suite's test files.")] = None
    tasks: Annotated[str | None, typer.Option(help="Tasks of the suite, with commas; all where left out.")] = None
    scoring: Annotated[str, typer.Option(help="Of the suite: generate or likelihood.")] = ComparisonSettings.scoring
    prompt: Annotated[str, typer.Option(help="Of the suite: published, training's own, or cloze.")] = (
        ComparisonSettings.prompt
    )
    equal_time: Annotated[
        bool, typer.Option("--equal-time", help="A second table: all trained as long as the first.")
    ] = False
    limit: Annotated[int | None, typer.Option(help="Test rows of each task.", min=1, max=MOST)] = (
        ComparisonSettings.limit
    )


@dataclass(frozen=True)
class OutputOptions:
    """Where it goes, and how much of it is done."""

    out: Annotated[Path | None, typer.Option(help="Folder; the recipe's output and -compare where left out.")] = None
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier comparison.")] = False
    plan: Annotated[bool, typer.Option("--plan", help="Say what would be done and how long it may take, no more.")] = (
        False
    )
    as_json: AsJson = False


@app.command()
@grouped
def compare(
    recipe: RecipePath, overrides: Overrides = None, *, arm: ArmOptions, trial: TrialOptions, output: OutputOptions
) -> None:
    """Compare methods of equal size on the same rows, each at its best rate; the same command goes on after a kill."""
    from qd2mora.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    folder, console = output.out or Path(f"{loaded.output}-compare"), Screen()
    with listening("what is done is kept, and the same command goes on from there"):
        from qd2mora.comparison.arms_file import read_arms
        from qd2mora.comparison.running import compare as run_comparison
        from qd2mora.comparison.tables import show, write_tables

        if arm.targets not in get_args(Linears):
            raise InputRefused(f"--targets: '{arm.targets}' will not do: own or recipe")
        wishes = read_arms(arm.arms, loaded) if arm.arms is not None else {}
        settings = _settings(arm, trial, tuple(wishes), loaded.train.learning_rate)
        if output.plan:
            from qd2mora.comparison.forecast import forecast

            for line in forecast(loaded, settings, wishes, is_asked=True):
                console.print(line, soft_wrap=True, highlight=False)
            return
        found = run_comparison(
            loaded,
            settings,
            folder,
            wishes=wishes,
            overwrite=output.overwrite,
            say=lambda line: console.print(line, soft_wrap=True),
        )
        names = ["compare.json", *write_tables(found, folder)]
    if output.as_json:
        typer.echo(json.dumps(found.to_json(), indent=1))
    else:
        show(found, console)
        console.print(f"{', '.join(names)} in {folder}", highlight=False, soft_wrap=True)


def _settings(arm: ArmOptions, trial: TrialOptions, arms: tuple[str, ...], own_rate: float) -> ComparisonSettings:
    """Return what is asked of a comparison; `arms` are those of a file. Raises InputRefused."""
    return ComparisonSettings(
        methods=words(arm.methods) or arms or ComparisonSettings.methods,
        targets="recipe" if arm.targets == "recipe" else "own",
        space=_space(arm.space),
        tries=arm.tries,
        equal_time=trial.equal_time,
        seeds=arm.seeds,
        rates=_rates(arm.sweep, own_rate),
        sweep_steps=arm.sweep_steps,
        minutes=arm.minutes,
        choose_rows=trial.choose_rows,
        strategies=words(trial.strategies),
        export=trial.export,
        limit=trial.limit,
        suite=trial.suite,
        data=None if trial.data is None else str(trial.data.resolve()),
        tasks=words(trial.tasks),
        scoring=trial.scoring,
        prompt=trial.prompt,
    )


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
