"""Judged answers after a run: `eval` says of held-out rows what training said, of the run and of its export."""

from pathlib import Path
from typing import Any

import judged_runs as runs
import pytest
import tiny

from qd2mora.evaluation import EvalOptions, Exam, evaluate
from qd2mora.evaluation.run_scores import score_run
from qd2mora.merging import ExportOptions, merge
from qd2mora.run_folder import RunFolder, read_recipe
from qd2mora.training import train

JUDGED = ("dpo", "orpo", "simpo", "kto", "peam")
"""Heads, which no export has, are in `test_rewards` and `test_capabilities`; grpo is evaluated as answers are."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judging")
    tiny.save_base(folder / "base")
    runs.save_rows(folder / "data")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QD2MORA_CACHE", str(tmp_path / "cache"))


def last_of(run: Path) -> dict[str, Any]:
    line = [line for line in runs.lines_of(run) if "eval_loss" in line][-1]
    return {"loss": line["eval_loss"]["pick"], **line["eval_measures"]["pick"]}


@pytest.mark.parametrize("kind", ["dpo", *(pytest.param(kind, marks=pytest.mark.long) for kind in JUDGED[1:])])
def test_eval_says_what_training_said_and_of_an_export_about_the_same(kind: str, made: Path, tmp_path: Path) -> None:
    run, export = tmp_path / "run", tmp_path / "export"
    train(runs.recipe_of(made, run, kind, "base.quantization=none"))
    told = last_of(run)
    scores = evaluate(run, how=EvalOptions(out=tmp_path / "scores.json"))
    score = scores["pick"]
    assert score.metric == ("rated" if kind == "kto" else "preferred") and score.rows == 9
    assert score.mean == pytest.approx(told["accuracy"]) and score.loss == pytest.approx(told["loss"], rel=1e-4)
    if kind != "kto":
        assert score.margin == pytest.approx(told["margin"], rel=1e-3, abs=1e-5)
    assert evaluate(run, how=EvalOptions(out=tmp_path / "scores.json"))["pick"] == score  # read back, not asked again
    merge(run, export, ExportOptions(dtype="float32"))
    merged = evaluate(export, Exam(recipe=read_recipe(run)))["pick"]
    assert merged.loss == pytest.approx(score.loss, rel=0.05)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_run_that_went_on_is_compared_with_its_start(kind: str, made: Path, tmp_path: Path) -> None:
    train(runs.recipe_of(made, tmp_path / "start", "orpo"))
    adapter = f"{{start: {tmp_path / 'start'}}}"
    train(runs.recipe_of(made, tmp_path / "next", kind, adapter=adapter))
    score = evaluate(tmp_path / "next")["pick"]
    assert score.loss == pytest.approx(last_of(tmp_path / "next")["loss"], rel=1e-4)


@pytest.mark.parametrize("kind", ["dpo", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("kto", "peam"))])
def test_a_run_that_added_experts_is_compared_with_its_start_among_them(kind: str, made: Path, tmp_path: Path) -> None:
    """New experts take a share of the gates from the first step on: the start is not the adapter alone."""
    train(runs.recipe_of(made, tmp_path / "start", "orpo"))
    adapter = f"{{start: {tmp_path / 'start'}, grow: 1}}"
    train(runs.recipe_of(made, tmp_path / "next", kind, "train.seed=3", adapter=adapter))
    told, score = last_of(tmp_path / "next"), evaluate(tmp_path / "next")["pick"]
    assert score.loss == pytest.approx(told["loss"], rel=1e-4) and score.mean == pytest.approx(told["accuracy"])
    if kind != "kto":
        assert score.margin == pytest.approx(told["margin"], rel=1e-3)


@pytest.mark.long
def test_a_run_is_scored_beside_its_base_which_prefers_nothing(made: Path, tmp_path: Path) -> None:
    train(runs.recipe_of(made, tmp_path / "run", "dpo"))
    scores = score_run(RunFolder(tmp_path / "run"), read_recipe(tmp_path / "run"))
    assert scores["base"]["pick"].margin == pytest.approx(0, abs=1e-4)
    assert scores["adapter"]["pick"].margin == pytest.approx(last_of(tmp_path / "run")["margin"], rel=1e-3)
