"""`select`: a bank of LoRAs and a pool of rows in, a recipe out that mixes the chosen ones and trains on the like rows.

See `bank` for what is chosen and why. The recipe is the given one with `adapter: {method: rocket, adapters: [...]}` and
one more task, the rows of the pool, as prompt and completion in the words that the given tasks are trained in.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from qd2mora.base import load_base, load_tokenizer
from qd2mora.base.passes import device_of
from qd2mora.composition.bank import Candidate, Chosen, chosen_of, likeness, near_and_new
from qd2mora.composition.beside import beside
from qd2mora.composition.fit_router import prompt_contexts
from qd2mora.composition.inputs import base_of, check_base, read_loras
from qd2mora.data import Row, TaskRows, prepare
from qd2mora.disk.durable import write_atomically
from qd2mora.errors import InputRefused, StopError
from qd2mora.evaluation import Score, Subject, ask_held_out, score_all
from qd2mora.mixture.trained_loras import TrainedLora, find_adapter
from qd2mora.recipe import Adapter, Recipe, Task
from qd2mora.safekeeping.places import already_there, check_place, write_beside

MOST_ROWS = 50
"""Labelled rows that a bank is scored on; of more the first are taken."""
PICKED = "picked"
POOL_ROWS = 2000
"""Rows of a pool that are looked at; of more, the first."""


@dataclass(frozen=True)
class SelectOptions:
    """bank: a folder of adapters; pool: a file of rows in the first task's format; rows: how many of them are taken.

    weight: how much the likeness of two updates counts against a set, beside scores within 0 and 2.
    """

    bank: Path
    pool: Path | None = None
    keep: int = 4
    rows: int = 200
    weight: float = 1.0


@dataclass(frozen=True)
class Selection:
    """What was chosen, of whom, on how many rows; `unread`: folders of the bank that hold no LoRA of this base."""

    base: Candidate
    candidates: list[Candidate]
    chosen: Chosen
    unread: dict[str, str]
    shots: int
    picked: int

    @property
    def folders(self) -> list[str]:
        """The adapters that were chosen."""
        return [self.candidates[number].folder for number in self.chosen.numbers]


def select(recipe: Recipe, options: SelectOptions, out: Path) -> Selection:
    """Choose adapters and rows; write the recipe `out`, and beside it the rows. Raises InputRefused."""
    rows_file = out.with_suffix(".rows.jsonl")
    for place in (out, rows_file):
        check_place(place, "--out")
    if out.exists():
        raise already_there(out, "--out")
    loras, unread = read_bank(options.bank, recipe)
    subject = Subject(load_base(recipe.base), load_tokenizer(recipe.base.model))
    tasks = _few(prepare(recipe.data, subject.tokenizer, recipe.train.seed))
    base, candidates = _scored(subject, loras, tasks)
    chosen = chosen_of(candidates, base, likeness(loras), options.keep, options.weight)
    if not chosen.numbers:
        raise InputRefused(f"--bank: none of the {len(loras)} adapters in '{options.bank}' is better than the base")
    picked = [] if options.pool is None else _picked(subject, recipe, tasks, options)
    if picked:
        lines = [json.dumps({"prompt": row.pair.prompt, "completion": row.pair.answer}) + "\n" for row in picked]
        write_beside(rows_file, "".join(lines).encode(), "--out")
    adapters = [candidates[number].folder for number in chosen.numbers]
    write_atomically(out, composed_recipe(recipe, adapters, rows_file if picked else None).dump_yaml())
    shots = sum(len(task.validation) for task in tasks)
    return Selection(base, candidates, chosen, unread, shots, len(picked))


def read_bank(bank: Path, recipe: Recipe) -> tuple[list[TrainedLora], dict[str, str]]:
    """Return the plain LoRAs in the folders of a bank that are of the recipe's base, and why others are not taken.

    Raises InputRefused where there is none.
    """
    if not bank.is_dir():
        raise InputRefused(f"--bank: no folder '{bank}'; name one whose folders hold LoRAs or runs")
    loras, unread = [], {}
    for folder in sorted(each for each in bank.iterdir() if each.is_dir() and find_adapter(each)):
        try:
            check_base("--bank", recipe, base_of([str(folder)]))
            loras += read_loras([str(folder)])
        except StopError as error:
            unread[folder.name] = str(error)
    if not loras:
        reasons = "; ".join(f"{name}: {why}" for name, why in unread.items()) or "no folder of it holds an adapter"
        raise InputRefused(f"--bank: '{bank}' holds no LoRA of {recipe.base.model}: {reasons}")
    return loras, unread


def composed_recipe(recipe: Recipe, adapters: Sequence[str], rows_file: Path | None) -> Recipe:
    """Return the recipe that mixes the adapters and trains on the picked rows too."""
    tasks = list(recipe.data.tasks)
    if rows_file is not None:
        # All tasks of a recipe have weights, or none.
        weight = None if tasks[0].weight is None else 1.0
        tasks.append(Task(name=PICKED, path=str(rows_file.absolute()), format="completion", weight=weight))
    adapter = Adapter(method="rocket", adapters=list(adapters), dropout=recipe.adapter.dropout)
    data = recipe.data.model_copy(update={"tasks": tasks})
    output = f"{recipe.output}-rocket"
    return recipe.model_copy(update={"adapter": adapter, "data": data, "output": output})


def _few(tasks: Sequence[TaskRows]) -> list[TaskRows]:
    """Return tasks that ask their first labelled rows, together at most MOST_ROWS."""
    each = max(1, MOST_ROWS // len(tasks))
    return [replace(task, validation=[*task.validation, *task.train][:each]) for task in tasks]


def _scored(
    subject: Subject, loras: Sequence[TrainedLora], tasks: Sequence[TaskRows]
) -> tuple[Candidate, list[Candidate]]:
    """Return the base as a candidate, and each LoRA on it."""
    asked = ask_held_out(list(tasks))
    base = _candidate("the base", list(score_all(subject, asked).values()))
    found = []
    for lora in loras:
        one = torch.ones(1, device=device_of(subject.model))
        with beside(subject.model, [lora], dict.fromkeys(lora.pairs, one)):
            # Of a run its own folder, which is how it is called everywhere.
            folder = lora.folder.parent if lora.folder.name == "adapter" else lora.folder
            found.append(_candidate(str(folder), list(score_all(subject, asked).values())))
    return base, found


def _candidate(folder: str, scores: Sequence[Score]) -> Candidate:
    judged = [value for score in scores if score.metric != "loss" for value in score.values]
    records = [record for score in scores for record in score.records]
    loss = sum(record.loss for record in records) / sum(record.labels for record in records)
    return Candidate(folder, sum(judged) / max(1, len(judged)), loss if math.isfinite(loss) else math.inf)


def _picked(subject: Subject, recipe: Recipe, tasks: Sequence[TaskRows], options: SelectOptions) -> list[Row]:
    first = recipe.data.tasks[0]
    if first.format in ("chat", "text"):
        raise InputRefused(f"--pool: rows of the format {first.format} have no one prompt to compare; leave it out")
    task = first.model_copy(
        update={"name": PICKED, "path": str(options.pool), "validation": 0, "limit": POOL_ROWS, "select": None}
    )
    data = recipe.data.model_copy(update={"tasks": [task], "stop": None})
    (pool,) = prepare(data, subject.tokenizer, recipe.train.seed)
    rows = list(pool.train)
    few = [row for each in tasks for row in each.validation]
    places = near_and_new(prompt_contexts(subject, rows), prompt_contexts(subject, few), options.rows)
    return [rows[place] for place in sorted(places)]


__all__ = ["SelectOptions", "Selection", "composed_recipe", "read_bank", "select"]
