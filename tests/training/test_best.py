"""The best of a run: judged as told, kept whole, the same after a kill, and the end of a run that stalls."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted import stop_after
from safetensors.torch import load_file
from test_training import assert_same_bytes, recipe

from qd2mora.errors import InputRefused, SignalStop
from qd2mora.evaluation import Record, Score
from qd2mora.run_folder import open_run
from qd2mora.training import train
from qd2mora.training.best import OVERALL, BestKeeper
from qd2mora.training.progress import Progress


def read_best(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "best.json").read_text(encoding="utf-8"))


def lines_of(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "eval_loss" in line]


CHANGES = ("train.learning_rate=0.05", "train.schedule=constant", "train.eval_every=1", "train.keep_best=tasks")


@pytest.fixture
def best_in_the_middle() -> Iterator[None]:
    """A rate that learns for three updates and destroys what was learned from then on, on any machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qd2mora.training.loop.learning_rate", lambda train, update, total: 0.05 if update < 3 else 1e3)
        yield


@pytest.mark.usefixtures("best_in_the_middle")
def test_the_best_is_what_the_journal_says_and_its_adapter_gives_that_loss(made: Path, tmp_path: Path) -> None:
    train(recipe(made, tmp_path / "run", *CHANGES))
    evaluations = [line for line in lines_of(tmp_path / "run") if line["step"]]
    best = read_best(tmp_path / "run" / "best")
    overall = min(evaluations, key=lambda line: sum(line["eval_loss"].values()))
    assert best["overall"] == {
        "step": overall["step"],
        "value": sum(overall["eval_loss"].values()) / 2,
        "by": "loss",
    }
    assert overall["step"] == 3
    for task in ("first", "last"):
        line = min(evaluations, key=lambda line: line["eval_loss"][task])
        assert best["tasks"][task] == {"step": line["step"], "value": line["eval_loss"][task], "by": "loss"}
    named = {best["overall"]["step"], *(entry["step"] for entry in best["tasks"].values())}
    folders = {path.name for path in (tmp_path / "run" / "best").iterdir()}
    assert folders == {"best.json", *(f"step-{step}" for step in named)}
    train(recipe(made, tmp_path / "again", *CHANGES, "train.final=best"))
    assert open_run(tmp_path / "again").model.active_adapter == "default"
    kept = load_file(tmp_path / "run" / "best" / f"step-{overall['step']}" / "adapter_model.safetensors")
    final = load_file(tmp_path / "again" / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(kept[name], final[name]) for name in kept)


@pytest.mark.usefixtures("best_in_the_middle")
def test_a_run_that_stalls_stops_and_a_kill_on_the_way_changes_nothing(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = (*CHANGES, "train.early_stopping=2", "train.steps=30", "data.tasks.0.metric=choice")
    whole = train(recipe(made, tmp_path / "whole", *changes))
    assert 3 <= whole.steps < 30
    losses = [sum(line["eval_loss"].values()) for line in lines_of(tmp_path / "whole") if line["step"]]
    assert min(losses) == losses[-3] and len(losses) == whole.steps
    assert all(set(line["eval_score"]) == {"first"} for line in lines_of(tmp_path / "whole"))
    stop_after(whole.steps - 2, monkeypatch)
    settings = recipe(made, tmp_path / "broken", *changes)
    with pytest.raises(SignalStop):
        train(settings)
    monkeypatch.undo()
    assert train(settings, resume=True).steps == whole.steps
    assert_same_bytes(tmp_path / "whole", tmp_path / "broken")
    assert lines_of(tmp_path / "whole") == lines_of(tmp_path / "broken")
    assert read_best(tmp_path / "whole" / "best") == read_best(tmp_path / "broken" / "best")
    assert train(settings, resume=True).steps == whole.steps


def test_a_copy_stays_while_a_checkpoint_names_it(tmp_path: Path) -> None:
    keeper = BestKeeper(tmp_path / "best", "overall", lambda place: place.mkdir())
    progress = Progress()
    for step, loss in ((1, 3.0), (2, 2.0), (3, float("nan")), (4, 1.0)):
        progress.step = step
        keeper.note(progress, {"a": loss}, {})
        if step == 1:
            keeper.settle(progress)  # a checkpoint begins that names step 1
    there = lambda: sorted(path.name for path in (tmp_path / "best").glob("step-*"))  # noqa: E731
    assert there() == ["step-1", "step-2", "step-4"] and progress.best[OVERALL][0] == 4
    keeper.settle(progress)  # the one that names step 4 begins: until it is on disk, step 1 is named
    assert there() == ["step-1", "step-4"]
    keeper.settle(progress)
    assert there() == ["step-4"] and progress.stale == 0


def test_the_whole_is_judged_by_metrics_only_where_every_task_names_one(tmp_path: Path) -> None:
    keeper = BestKeeper(tmp_path / "best", "none", lambda place: None)
    score = Score("exact", (Record(0, 1.0, 2.0, 1), Record(1, 0.0, 2.0, 1)))
    progress = Progress(step=1)
    keeper.note(progress, {"a": 4.0, "b": 2.0}, {"a": score})
    assert progress.best == {OVERALL: (1, 3.0, "loss"), "a": (1, 0.5, "exact"), "b": (1, 2.0, "loss")}
    keeper.note(progress, {"a": 9.0, "b": 9.0}, {"a": score})
    assert progress.stale == 1
    progress = Progress(step=1)
    keeper.note(progress, {"a": 4.0}, {"a": score})
    assert progress.best[OVERALL] == (1, 0.5, "mean score")
    assert not (tmp_path / "best").exists()


@pytest.mark.parametrize("key", ["early_stopping=2", "final=best"])
def test_judging_without_held_out_rows_is_refused_before_the_folder_is_made(
    key: str, made: Path, tmp_path: Path
) -> None:
    settings = recipe(made, tmp_path / "run", f"train.{key}", "data.tasks.0.validation=0", "data.tasks.1.validation=0")
    with pytest.raises(InputRefused, match=f"train.{key.split('=')[0]}: no task holds out rows"):
        train(settings)
    assert not (tmp_path / "run").exists()
