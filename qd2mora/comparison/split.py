"""One split for every arm and seed: rows to learn, rows to choose the learning rate by, rows to test.

Written as files into the comparison's folder, so that every arm reads the same bytes. The test rows are those that the
recipe holds out; the rows to choose by are taken from the rest, and no test row is ever seen before the end.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from qd2mora.data.file_rows import BadRow, rows_of
from qd2mora.disk.staged import staged_folder
from qd2mora.errors import InputRefused
from qd2mora.recipe import Recipe, Task

LEARN, CHOOSE, TEST = "learn", "choose", "test"


def split_tasks(recipe: Recipe, folder: Path, num_choose: int, *, has_test: bool = True) -> Recipe:
    """Write the split into `folder` where it is not there; return the recipe that learns from it.

    In it a task's held-out rows are those to choose by. Without a test what the recipe holds out is not used: tests
    come from elsewhere. Raises InputRefused with file and row.
    """
    if not folder.is_dir():
        with staged_folder(folder) as stage:
            for task in recipe.data.tasks:
                for part, rows in _parts(task, num_choose, has_test, recipe.data.on_bad_row == "skip").items():
                    text = "".join(json.dumps(row) + "\n" for row in rows)
                    (stage / f"{task.name}.{part}.jsonl").write_text(text, encoding="utf-8")
    tasks = [_reading(task, folder, LEARN, CHOOSE) for task in recipe.data.tasks]
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"tasks": tasks})})


def testing(recipe: Recipe, folder: Path) -> Recipe:
    """Return the recipe whose held-out rows are the test rows."""
    tasks = [_reading(task, folder, LEARN, TEST) for task in recipe.data.tasks]
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"tasks": tasks})})


def _reading(task: Task, folder: Path, learn: str, held_out: str) -> Task:
    changes = {
        "path": str((folder / f"{task.name}.{learn}.jsonl").resolve()),
        "validation": str((folder / f"{task.name}.{held_out}.jsonl").resolve()),
        "limit": None,
        "select": None,
    }
    return task.model_copy(update=changes)


def _parts(task: Task, num_choose: int, has_test: bool, skips: bool) -> dict[str, list[Any]]:
    rows = _rows(task, task.path, skips)
    # By the task's name alone, so that neither a seed of the comparison nor other tasks change the split.
    order = np.random.default_rng([*task.name.encode()]).permutation(len(rows)).tolist()
    if isinstance(task.validation, str):
        test, num_test = _rows(task, task.validation, skips), 0
    else:
        num_test = task.validation
        test = [rows[place] for place in sorted(order[:num_test])]
    if has_test and not test:
        raise InputRefused(f"data.tasks.{task.name}.validation: a comparison needs held-out rows to test on")
    if num_test + num_choose >= len(rows):
        raise InputRefused(
            f"data.tasks.{task.name}: {num_test} test rows and {num_choose} rows to choose the learning rate by leave "
            f"none of {len(rows)} to learn from; fewer of --choose-rows or data.tasks.{task.name}.validation"
        )
    # A row to choose by, or to learn from, is no copy of a test row.
    seen = {json.dumps(row, sort_keys=True) for row in test}
    left = [place for place in order[num_test:] if json.dumps(rows[place], sort_keys=True) not in seen]
    choose, learn = sorted(left[:num_choose]), sorted(left[num_choose:])
    if not learn:
        raise InputRefused(
            f"data.tasks.{task.name}: {len(order) - num_test - len(left)} of {len(rows)} rows are copies of test rows, "
            f"and {num_choose} rows to choose the learning rate by leave none to learn from; fewer of --choose-rows"
        )
    return {LEARN: [rows[each] for each in learn], CHOOSE: [rows[each] for each in choose], TEST: test}


def _rows(task: Task, path: str, skips: bool) -> list[Any]:
    """Return the rows that the task selects, as they stand in the file, up to its limit; `skips`: broken ones apart."""
    rows: list[Any] = []
    for place, row in rows_of(path, task):
        if len(rows) == task.limit:
            break
        if isinstance(row, BadRow) or not isinstance(row, dict):
            if skips:
                continue
            why = row if isinstance(row, BadRow) else "a row is an object"
            raise InputRefused(f"{path}, {place}: {why}")
        if all(str(row.get(name)) == value for name, value in (task.select or {}).items()):
            rows.append(row)
    return rows


__all__ = ["split_tasks", "testing"]
