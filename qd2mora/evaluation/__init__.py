"""Evaluation: asking a run, an export or a base, and scoring the answers."""

from collections.abc import Collection
from pathlib import Path

import torch

from qd2mora.data.instruction import split
from qd2mora.errors import InputRefused
from qd2mora.evaluation.asked import AskedTask, ask_held_out, ask_suite
from qd2mora.evaluation.evaluate import evaluate, score_all, score_tasks
from qd2mora.evaluation.score import Record, Score, bootstrap
from qd2mora.evaluation.scoring import score_task
from qd2mora.evaluation.subject import Subject, open_subject
from qd2mora.evaluation.suites import SUITES


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


__all__ = [
    "SUITES",
    "AskedTask",
    "Record",
    "Score",
    "Subject",
    "ask_held_out",
    "ask_suite",
    "bootstrap",
    "evaluate",
    "generate",
    "open_subject",
    "score_all",
    "score_task",
    "score_tasks",
]
