"""How long a run may take is measured on the device, labelled as an estimate, and told not to be where it is not."""

import json
from pathlib import Path

import pytest
import tiny

from qd2mora.base import load_tokenizer
from qd2mora.data import first_rows
from qd2mora.memory.plan import plan
from qd2mora.recipe import Recipe, load_recipe
from qd2mora.training import timing
from qd2mora.training.timing import (
    Pass,
    held_out_rows,
    num_steps,
    of_training,
    outlook,
    seconds_of_training,
    why_not_timed,
)


def recipe(made: Path, *changes: str, method: str = "d2mora") -> Recipe:
    path = made / "recipe.yaml"
    path.write_text(tiny.recipe_text(made / "base", made / "data", made / "run", method=method), encoding="utf-8")
    return load_recipe(path, list(changes))


@pytest.mark.parametrize("method", ["d2mora", "remix", "dora"])
def test_a_run_at_hand_is_timed_and_nothing_is_left_behind(method: str, made: Path) -> None:
    asked = recipe(made, "train.steps=40", method=method)
    tokenizer = load_tokenizer(str(made / "base"))
    before = sorted(made.rglob("*"))
    found = list(first_rows(asked.data, tokenizer))
    line = outlook(asked, plan(asked), found, tokenizer.pad_token_id, of_training(asked))
    assert line.startswith("time: about ") and ": 40 steps of " in line
    assert "estimated from 2 micro batches of" in line
    assert sorted(made.rglob("*")) == before


def test_the_whole_is_the_sum_of_its_steps_and_evaluations(made: Path) -> None:
    asked = recipe(made, "train.steps=40", "train.eval_every=20", "train.global_batch=4")
    measured = Pass(training=2.0, forward=1.0, number=2, rows=4, loading=7.0)
    held_out = sum(task.validation for task in asked.data.tasks if isinstance(task.validation, int))
    assert held_out_rows(asked) == held_out > 0
    assert seconds_of_training(asked, measured, 40) == 7.0 + 40 * 4 * 2.0 + 3 * held_out * 1.0


def test_steps_follow_from_epochs_and_the_rows_of_files(made: Path) -> None:
    asked = recipe(made, "train.steps=null", "train.epochs=2", "train.global_batch=4")
    rows = sum(len((made / f"data/{name}.jsonl").read_text().splitlines()) for name in ("first", "last"))
    assert num_steps(asked) == -(-2 * (rows - held_out_rows(asked)) // 4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["base.model=random:tiny"], "is not at hand"),
        (["memory.budget=8GiB"], "a GPU that is not here is planned for"),
    ],
)
def test_where_nothing_is_measured_it_is_said(
    changes: list[str], words: str, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    asked = recipe(made, *changes)
    line = outlook(asked, plan(asked), [], 0, of_training(asked))
    assert line.startswith("time: not estimated, as ") and words in line


@pytest.mark.parametrize("limit", ["LARGEST_BYTES", "LARGEST_PEAK"])
def test_a_large_base_or_adapter_is_tried_only_where_that_is_asked_for(
    limit: str, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = recipe(made)
    rows = next(iter(first_rows(asked.data, load_tokenizer(str(made / "base"))))).rows
    monkeypatch.setattr(timing, limit, 1)
    assert "--time measures all the same" in why_not_timed(asked, plan(asked), rows, is_asked=False)
    assert why_not_timed(asked, plan(asked), rows, is_asked=True) == ""
    assert json.dumps(plan(asked).to_json())
