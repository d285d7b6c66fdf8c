"""Evaluation: asking a run, an export or a base, and scoring the answers."""

from collections.abc import Collection
from pathlib import Path

import torch

from qd2mora.data import prepare
from qd2mora.data.instruction import split
from qd2mora.errors import InputRefused
from qd2mora.evaluation.score import Score, score_rows, score_tasks
from qd2mora.evaluation.subject import Subject, open_subject
from qd2mora.recipe import load_recipe
from qd2mora.run_folder import is_run, read_recipe


def evaluate(
    model: str | Path,
    *,
    recipe: str | Path | None = None,
    limit: int | None = None,
    allow_changed: Collection[str] = (),
) -> dict[str, Score]:
    """Score a run or model folder on held-out rows, per task: those of `recipe`, else of the run itself.

    Raises InputRefused where there is nothing to ask, or the base is another (unless `allow_changed`), DamagedFile.
    """
    if recipe is None and not is_run(model):
        raise InputRefused(f"'{model}' is not a run: say with --recipe whose held-out rows to ask")
    asked = load_recipe(recipe) if recipe else read_recipe(model)
    subject = open_subject(model, allow_changed)
    scores = score_tasks(subject, prepare(asked.data, subject.tokenizer, asked.train.seed), limit)
    if not scores:
        raise InputRefused("no task of the recipe holds out rows; set data.tasks.0.validation=200")
    return scores


def generate(
    model: str | Path,
    prompt: str,
    *,
    raw: bool = False,
    task: str | None = None,
    vector: list[float] | None = None,
    max_new_tokens: int = 128,
    allow_changed: Collection[str] = (),
) -> str:
    """Answer an instruction (or, `raw`, continue a text) greedily; `task` and `vector` where the adapter reads them.

    Raises InputRefused, DamagedFile.
    """
    subject = open_subject(model, allow_changed)
    text = prompt if raw else split({"instruction": prompt, "output": ""})[0]
    ids = torch.tensor([subject.tokenizer(text)["input_ids"]], device=subject.plain.device)
    row = {"task_index": torch.tensor([_task_number(subject, task)], device=ids.device)}
    if _checked_vector(subject, vector):
        row["external"] = torch.tensor([vector], device=ids.device)
    subject.route(row)
    tokens = subject.continue_texts(ids, torch.ones_like(ids), max_new_tokens)[0]
    return subject.tokenizer.decode(tokens, skip_special_tokens=True)


def _task_number(subject: Subject, task: str | None) -> int:
    if subject.run is None:
        return 0
    names = [each.name for each in subject.run.recipe.data.tasks]
    if task is not None and task not in names:
        raise InputRefused(f"--task: no task '{task}' in this run; there are {', '.join(names)}")
    if task is None and subject.run.reads_task and len(names) > 1:
        raise InputRefused(f"--task: this adapter routes by task; name one of {', '.join(names)}")
    return names.index(task) if task else 0


def _checked_vector(subject: Subject, vector: list[float] | None) -> bool:
    """Tell whether the adapter reads a vector, and refuse a missing one, one too many, or one of another length."""
    width = subject.run.vector_width if subject.run else None
    if width is None:
        if vector is not None:
            raise InputRefused("--vector: this model reads none")
        return False
    if vector is None or len(vector) != width:
        given = "none" if vector is None else f"{len(vector)} numbers"
        raise InputRefused(f"--vector: this adapter reads {width} numbers of each row, {given} given")
    return True


__all__ = ["Score", "Subject", "evaluate", "generate", "open_subject", "score_rows", "score_tasks"]
