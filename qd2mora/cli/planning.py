"""What `plan` says: the memory of a run, the first rows of its data, and how long it may take."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
import typer

from qd2mora.base import RANDOM, load_tokenizer
from qd2mora.base.loading import known_shape
from qd2mora.data import FirstRows, first_rows
from qd2mora.data.first_rows import refuse_missing_files
from qd2mora.errors import InputRefused
from qd2mora.memory import Plan, plan, render
from qd2mora.memory.engine import unshared
from qd2mora.recipe import Recipe
from qd2mora.terminal import Screen
from qd2mora.training.timing import of_training
from qd2mora.training.timing import outlook as time_of


@dataclass
class Outlook:
    """A run before its start; `problem`: what is wrong with its data, which training would refuse too."""

    planned: Plan
    rows: list[FirstRows] = field(default_factory=list)
    problem: InputRefused | None = None
    pad: int = 0

    def finish(self) -> None:
        """End the verb as it has to end. Raises InputRefused, and Exit where the run does not fit."""
        if self.problem is not None:
            raise self.problem
        if not self.planned.fits:
            raise typer.Exit(3)


@dataclass(frozen=True)
class Wishes:
    """What is asked of `plan`; `time`: whether to measure it, None: where that is quick."""

    budget: str | None
    device: str | None
    time: bool | None
    as_json: bool


def show(recipe: Recipe, wishes: Wishes) -> Outlook:
    """Plan, read the first rows, and print both; the plan is printed too where rows cannot be read."""
    outlook = Outlook(plan(recipe, wishes.budget, None if wishes.device is None else torch.device(wishes.device)))
    _read_rows(recipe, outlook)
    if wishes.as_json:
        data = {each.task.name: each.to_json() for each in outlook.rows}
        content = {**outlook.planned.to_json(), "data": data}
        if wishes.time:
            content["time"] = _time(recipe, outlook, wishes)
        typer.echo(json.dumps(content, indent=1))
        return outlook
    screen = Screen()
    screen.print(render(outlook.planned))
    for line in [*_notes(recipe), *(each.line(recipe.data.max_length) for each in outlook.rows)]:
        screen.print(line, soft_wrap=True, highlight=False)
    if wishes.time is not False:
        screen.print(_time(recipe, outlook, wishes), soft_wrap=True, highlight=False)
    return outlook


def _time(recipe: Recipe, outlook: Outlook, wishes: Wishes) -> str:
    """Say how long the run may take, or why that is not known."""
    if outlook.problem is not None or not outlook.planned.fits:
        return "time: not estimated, as this run would not start"
    rows = outlook.rows
    words = of_training(recipe)
    return time_of(recipe, outlook.planned, rows, outlook.pad, words, is_asked=bool(wishes.time))


def _read_rows(recipe: Recipe, outlook: Outlook) -> None:
    """Read the first rows of each task, as far as that goes; a base that is a shape alone has no words for them."""
    if recipe.base.model.startswith(RANDOM):
        return
    try:
        if known_shape(recipe.base) is not None:
            refuse_missing_files(recipe.data)
            return
        tokenizer = load_tokenizer(recipe.base.model)
        outlook.pad = tokenizer.pad_token_id
        for each in first_rows(recipe.data, tokenizer):
            outlook.rows.append(each)
    except InputRefused as error:
        outlook.problem = error


def _notes(recipe: Recipe) -> list[str]:
    notes = [f"rows are planned as {recipe.data.max_length} tokens long (data.max_length)"]
    if recipe.base.model.startswith(RANDOM):
        notes.append(f"'{recipe.base.model}' is a shape alone: no data is read for it")
    name = known_shape(recipe.base)
    if name is not None:
        notes.append(
            f"'{recipe.base.model}' is not on this machine: its shape is {name}'s in the table of known models, and "
            "rows are not read as its tokens"
        )
    if recipe.data.packing:
        notes.append("data.packing: a line of packed rows is planned for as one row of data.max_length tokens")
    if unshared(recipe):
        notes.append(unshared(recipe))
    return notes


def refuse_undrawable(png: Path | None) -> None:
    """Refuse a picture that could not be drawn, before anything is computed. Raises InputRefused."""
    if png is not None:
        from qd2mora.report import check_png

        check_png(png)


def draw(outlook: Outlook, png: Path | None) -> None:
    """Draw the plan where a picture is wanted."""
    if png is not None:
        from qd2mora.report import draw_plan

        draw_plan(outlook.planned, png)


__all__ = ["Outlook", "Wishes", "draw", "refuse_undrawable", "show"]
