"""What `plan` says: the memory of a run, the first rows of its data, and how long it may take."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
import typer

from qd2mora.base import RANDOM, load_tokenizer
from qd2mora.data import FirstRows, first_rows
from qd2mora.errors import InputRefused
from qd2mora.memory import Plan, plan, render
from qd2mora.memory.engine import unshared
from qd2mora.recipe import Recipe
from qd2mora.terminal import Screen


@dataclass
class Outlook:
    """A run before its start; `problem`: what is wrong with its data, which training would refuse too."""

    planned: Plan
    rows: list[FirstRows] = field(default_factory=list)
    problem: InputRefused | None = None

    def finish(self) -> None:
        """End the verb as it has to end. Raises InputRefused, and Exit where the run does not fit."""
        if self.problem is not None:
            raise self.problem
        if not self.planned.fits:
            raise typer.Exit(3)


def show(recipe: Recipe, budget: str | None, device: str | None, as_json: bool) -> Outlook:
    """Plan, read the first rows, and print both; the plan is printed too where rows cannot be read."""
    outlook = Outlook(plan(recipe, budget, None if device is None else torch.device(device)))
    _read_rows(recipe, outlook)
    if as_json:
        data = {each.task.name: each.to_json() for each in outlook.rows}
        typer.echo(json.dumps({**outlook.planned.to_json(), "data": data}, indent=1))
        return outlook
    screen = Screen()
    screen.print(render(outlook.planned))
    for line in [*_notes(recipe), *(each.line(recipe.data.max_length) for each in outlook.rows)]:
        screen.print(line, soft_wrap=True, highlight=False)
    return outlook


def _read_rows(recipe: Recipe, outlook: Outlook) -> None:
    """Read the first rows of each task, as far as that goes; a base that is a shape alone has no words for them."""
    if recipe.base.model.startswith(RANDOM):
        return
    try:
        for each in first_rows(recipe.data, load_tokenizer(recipe.base.model)):
            outlook.rows.append(each)
    except InputRefused as error:
        outlook.problem = error


def _notes(recipe: Recipe) -> list[str]:
    notes = [f"rows are planned as {recipe.data.max_length} tokens long (data.max_length)"]
    if recipe.base.model.startswith(RANDOM):
        notes.append(f"'{recipe.base.model}' is a shape alone: no data is read for it")
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


__all__ = ["Outlook", "draw", "refuse_undrawable", "show"]
