"""Verbs on a recipe: train, plan, preview."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from qd2mora.cli.app import MOST, AllowChanged, AsJson, Overrides, RecipePath, app
from qd2mora.stopping import listening
from qd2mora.terminal import Screen

MeasureTime = Annotated[
    bool | None, typer.Option("--time/--no-time", help="Time a few micro batches here; else where the base is small.")
]

RewardFile = Annotated[Path | None, typer.Option(help="Of grpo with rule: file: your Python, def reward(...).")]


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest whole checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run.")] = False,
    allow_changed: AllowChanged = None,
    reward_file: RewardFile = None,
) -> None:
    """Plan, then train; write the run folder."""
    from qd2mora.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    if resume or overwrite:
        loaded = loaded.model_copy(update={"output": own_folder(recipe, loaded.output, overrides or [])})
    # A signal counts from here on: the imports alone take seconds.
    with listening():
        from qd2mora.cli.training_end import finish
        from qd2mora.training import train as run_training

        trained = run_training(
            loaded, resume=resume, overwrite=overwrite, allow_changed=allow_changed or (), reward_file=reward_file
        )
        if trained.is_main:
            finish(trained.folder, Screen())


def own_folder(path: Path, output: str, overrides: list[str]) -> str:
    """Return where a run goes on: one that was moved or copied where its recipe lies, which is said."""
    folder = path.resolve().parent
    is_told = any(override.partition("=")[0].strip() == "output" for override in overrides)
    if path.name != "recipe.yaml" or is_told or not (folder / "checkpoints").is_dir():
        return output
    if Path(output).resolve() == folder or not (folder / "manifest.json").is_file():
        return output
    typer.echo(f"output: '{output}' in the recipe is where this run lay before; training goes on in '{folder}'")
    return str(folder)


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    budget: Annotated[str | None, typer.Option(help="Memory to fit, for example 8GiB.")] = None,
    device: Annotated[
        Literal["cpu", "cuda"] | None, typer.Option(help="Plan for it; else for what is here, a budget's GPU.")
    ] = None,
    measure_time: MeasureTime = None,
    as_json: AsJson = False,
    png: Annotated[Path | None, typer.Option(help="Draw the items as bars. Needs the extra figures.")] = None,
) -> None:
    """Say what a run will need, item by item, without reading weights; the first rows of its data are read."""
    from qd2mora.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from qd2mora.cli.planning import Wishes, draw, refuse_undrawable, show

    refuse_undrawable(png)
    outlook = show(loaded, Wishes(budget, device, measure_time, as_json))
    draw(outlook, png)
    outlook.finish()


@app.command()
def preview(
    recipe: RecipePath,
    overrides: Overrides = None,
    number: Annotated[int, typer.Option("-n", help="Rows of each task.", min=1, max=MOST)] = 3,
) -> None:
    """Show rows as the model sees them: what is given, what is learned, lengths, shares."""
    from qd2mora.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from qd2mora.report import show_rows

    show_rows(loaded, number, Screen())


@app.command()
def suggest_experts(
    recipe: RecipePath,
    overrides: Overrides = None,
    most: Annotated[int, typer.Option(help="Most clusters to try.", min=2, max=64)] = 12,
    as_json: AsJson = False,
) -> None:
    """Cluster the prompts of a recipe and suggest a number of experts; reads no weights."""
    from qd2mora.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from qd2mora.base import load_tokenizer
    from qd2mora.data import prepare
    from qd2mora.data.expert_suggestion import suggest_experts as suggest
    from qd2mora.report import show_suggestion

    tasks = prepare(loaded.data, load_tokenizer(loaded.base.model), loaded.train.seed)
    found = suggest(tasks, most, loaded.train.seed)
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=1))
    else:
        show_suggestion(found, Screen())


__all__ = ["own_folder", "plan", "preview", "suggest_experts", "train"]
