"""Comparing: arms of one size, rows kept apart, a fair sweep, the same outcome after a kill."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from test_cli import run as run_cli

from qd2mora.comparison import ComparisonSettings, arm_scores, trials
from qd2mora.comparison.forecast import forecast, steps_in_all
from qd2mora.comparison.intervals import difference, interval, macro
from qd2mora.comparison.matched_arms import COARSE, LIMIT, matched_arms
from qd2mora.comparison.outcome import verdicts
from qd2mora.comparison.running import compare
from qd2mora.comparison.split import split_tasks
from qd2mora.errors import InputRefused
from qd2mora.memory import plan
from qd2mora.merging import STRATEGIES, ExportOptions
from qd2mora.mixture import MixtureConfig
from qd2mora.mixture.presets import METHODS as METHODS_BY_NAME
from qd2mora.recipe import Recipe, load_recipe


def settings(made: Path, *changes: str) -> Recipe:
    return load_recipe(made / "recipe.yaml", ["train.steps=2", *changes])


METHODS = ["d2mora", "lora", "hydralora", "moslora", "moelora", "loramoe", "mola", "comol"]


@pytest.mark.parametrize("base", ["own", pytest.param("random:llama-7b", marks=pytest.mark.long)])
def test_every_arm_trains_as_many_parameters_and_the_planner_counts_the_same(base: str, made: Path) -> None:
    changes = () if base == "own" else (f"base.model={base}", "adapter.rank=16", "adapter.alpha=32")
    recipe = settings(made, *changes)
    arms = matched_arms(recipe, METHODS)
    assert arms[0].adapter == recipe.adapter
    for arm in arms:
        # On the tiny base one rank of some methods is more than two hundredths, and they say so.
        is_coarse = arm.name in (("moslora", "comol") if base == "own" else ("mola",))
        away = abs(arm.parameters - arms[0].parameters) / arms[0].parameters
        assert away <= (COARSE if is_coarse else LIMIT)
        assert (away > LIMIT) == any("parameters than the first" in note for note in arm.notes)
        assert plan(recipe.model_copy(update={"adapter": arm.adapter})).trainable_parameters == arm.parameters
        if arm.name != "d2mora":
            config = MixtureConfig.from_recipe(arm.adapter, 2)
            assert config.scaling == pytest.approx(METHODS_BY_NAME[arm.name].scaling)  # the method's own


@pytest.mark.parametrize(
    ("method", "words"), [("cat", "starts from trained LoRAs"), ("meteora", "starts from trained LoRAs")]
)
def test_a_method_that_no_rank_can_match_is_refused(method: str, words: str, made: Path) -> None:
    with pytest.raises(InputRefused, match=words):
        matched_arms(settings(made), ["d2mora", method])


def test_no_row_is_in_two_parts_and_the_split_is_the_same_for_everybody(made: Path, tmp_path: Path) -> None:
    recipe = settings(made, "data.tasks.0.limit=30")
    split_tasks(recipe, tmp_path / "split", 5)
    for task, number in (("first", 30), ("last", 40)):
        parts = {}
        for part in ("learn", "choose", "test"):
            text = (tmp_path / "split" / f"{task}.{part}.jsonl").read_text(encoding="utf-8")
            parts[part] = text.splitlines()
        assert [len(parts["choose"]), len(parts["test"])] == [5, 8]
        whole = (made / "data" / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()[:number]
        # tiny's rows repeat every twelve: copies of test rows are left out
        assert not set(parts["test"]) & (set(parts["learn"]) | set(parts["choose"]))
        assert {json.dumps(json.loads(line)) for line in whole} == set().union(*map(set, parts.values()))
    reseeded = recipe.model_copy(update={"train": recipe.train.model_copy(update={"seed": 9})})
    again = split_tasks(reseeded, tmp_path / "other", 5)
    assert again.data.tasks[0].limit is None
    for path in (tmp_path / "split").iterdir():
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes()


def test_an_interval_of_equal_arms_holds_zero_and_of_planted_ones_the_difference() -> None:
    rng = np.random.default_rng(0)
    noise = {task: rng.normal(1, 1, (3, 200)) for task in "ab"}
    # what rows and seeds have in common cancels in a paired difference
    other = {task: each - 0.1 + rng.normal(0, 0.2, each.shape) for task, each in noise.items()}
    low, high = interval(difference(other, noise))
    assert low < -0.1 < high < 0
    assert macro(difference(other, noise)) == pytest.approx(-0.1, abs=0.03)
    equal = {task: each + rng.normal(0, 0.2, each.shape) for task, each in noise.items()}
    low, high = interval(difference(equal, noise))
    assert low < 0 < high
    assert interval(difference(equal, noise)) == (low, high)


@pytest.mark.long
def test_a_comparison_that_was_killed_goes_on_to_the_same_outcome(made: Path, tmp_path: Path, monkeypatch) -> None:
    recipe = settings(made)
    wishes = ComparisonSettings(("d2mora", "moelora"), 2, rates=(1e-3, 1e-2), choose_rows=4, strategies=("mean_gate",))
    whole = compare(recipe, wishes, tmp_path / "whole")
    trained = []
    once = trials.train

    def killed_at_the_fourth(recipe: Recipe, **options: bool):
        trained.append(Path(recipe.output).name)
        if len(trained) == 4:
            raise KeyboardInterrupt
        return once(recipe, **options)

    monkeypatch.setattr(trials, "train", killed_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        compare(recipe, wishes, tmp_path / "broken")
    broken = compare(recipe, wishes, tmp_path / "broken")
    assert len(trained) == 4 + 4 + 1  # two rates and two seeds of two arms, and the one that was killed
    read = [json.loads((tmp_path / name / "compare.json").read_text(encoding="utf-8")) for name in ("whole", "broken")]
    assert read[0] == read[1]
    assert verdicts(whole) == verdicts(broken) and len(verdicts(whole)) == 2
    tasked = read[0]["arms"][1]
    # an export for one task is the adapter at that task, up to rounding to float16
    assert tasked["export"]["loss"] == pytest.approx(tasked["trained"]["loss"], abs=2e-3)
    assert tasked["export"]["strategies"] == [{"first": "exact", "last": "exact"}] * 2
    assert tasked["sweep"].keys() == {"0.001", "0.01"} and tasked["rate"] in (1e-3, 1e-2)
    with pytest.raises(InputRefused, match="wishes changed"):
        compare(recipe, ComparisonSettings(wishes.methods, 2, rates=(1e-3,), choose_rows=4), tmp_path / "broken")


def test_the_command_line_compares_within_minutes_and_writes_table_and_picture(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(trials.statistics, "median", lambda taken: 0.1)  # seconds a step
    asked = ["--methods", "d2mora,lora", "--seeds", 1, "--sweep", "none", "--minutes", 0.025, "--choose-rows", 4]
    asked += ["--no-export", "--out", out]
    assert run_cli(monkeypatch, "compare", made / "recipe.yaml", *asked) == 0
    shown = capsys.readouterr().out
    assert "1 seeds" in shown and "as trained: " in shown
    assert (out / "compare.md").read_text(encoding="utf-8").count("|") > 20
    assert (out / "compare.png").stat().st_size > 5000
    # 1.5 seconds, a tenth for each step of either arm
    assert json.loads((out / "compare.json").read_text(encoding="utf-8"))["steps"] == 7
    sweep = ["--methods", "lora", "--seeds", 0, "--sweep", "1e-3,1e-2", "--choose-rows", 4, "--out", tmp_path / "sweep"]
    assert run_cli(monkeypatch, "compare", made / "recipe.yaml", "train.steps=2", *sweep) == 0
    assert "at the edge" in capsys.readouterr().out


def test_arms_may_be_tested_on_the_files_of_a_suite(made: Path, tmp_path: Path) -> None:
    rows = [{"instruction": f"Is {word} red? true or false", "answer": "true"} for word in ("sun", "sea", "grass")]
    (tmp_path / "boolq.json").write_text(json.dumps(rows), encoding="utf-8")
    asked = ComparisonSettings(
        ("d2mora", "lora"), 1, choose_rows=4, strategies=("mean_gate",), limit=2, suite="commonsense", tasks=("boolq",)
    )
    asked = replace(asked, data=str(tmp_path), scoring="likelihood")
    found = compare(settings(made, "data.tasks.0.validation=0"), asked, tmp_path / "out")
    assert found.rows == {"boolq": 2} and found.metric == "choice"
    assert all(np.isfinite(arm.stages[stage].loss.mean) for arm in found.arms for stage in ("trained", "export"))
    with pytest.raises(InputRefused, match="moelora routes by task and would not be trained on 'boolq'"):
        compare(settings(made), replace(asked, methods=("d2mora", "moelora")), tmp_path / "other")
    with pytest.raises(InputRefused, match=r"boolq\.json, row 1: no question with its choices"):
        compare(settings(made), replace(asked, prompt="cloze"), tmp_path / "cloze")


@pytest.mark.parametrize(("task", "has_per_task"), [(None, False), ("first", True)])
def test_where_no_strategies_are_named_those_are_tried_that_go_with_what_is_exported(
    task: str | None, has_per_task: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def exported(run: Path, out: Path, options: ExportOptions) -> SimpleNamespace:
        tried.append(options.strategy)
        out.mkdir()
        fidelity = SimpleNamespace(merged=2.0 if options.strategy == "sequential" else 3.0)
        return SimpleNamespace(strategy=options.strategy, fidelity=fidelity, exact=False)

    monkeypatch.setattr(arm_scores, "merge", exported)
    place, best = arm_scores._best_of(tmp_path / "run", (), task)
    assert best == "sequential" and list(tmp_path.iterdir()) == [place]
    assert set(STRATEGIES) - set(tried) == (set() if has_per_task else {"per_task"})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--suite", "comonsense"], "did you mean 'commonsense'"),
        (["--suite", "commonsense"], "--data: say in which folder"),
        (["--suite", "commonsense", "--data", "nowhere"], "no folder"),
        (["--data", "nowhere"], "name it with --suite"),
        (["--methods", "d2mora,d2mora"], "different ones"),
        (["--methods", "d2mroa"], "did you mean 'd2mora'"),
        (["--sweep", "fast"], "--sweep: 'fast'"),
        (["--choose-rows", "40"], "leave none of 40"),
        (["data.tasks.0.validation=0"], "needs held-out rows"),
        (["--minutes", "0"], "--minutes: 0 are too few"),
        (["--strategies", "mean_gates"], "unknown strategy 'mean_gates'; did you mean 'mean_gate'"),
        (["data.tasks.0.fields={output: reply}"], "first.jsonl, row 1: no field 'reply'"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    arguments: list[str],
    words: str,
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [] if "--choose-rows" in arguments else ["--choose-rows", "4"]
    assert run_cli(monkeypatch, "compare", made / "recipe.yaml", *arguments, *rows, "--out", tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert words in err and err.startswith("error: ") and err.count("\n") == 1
    assert not (tmp_path / "out").exists() or "--minutes" in arguments  # other settings may take the folder


def test_a_comparison_is_planned_without_training_and_says_how_long_it_may_take(made: Path, tmp_path: Path) -> None:
    recipe = settings(made, "train.steps=6")
    wishes = ComparisonSettings(("d2mora", "lora"), 3, rates=(1e-3, 1e-2), sweep_steps=2)
    before = sorted(made.rglob("*"))
    lines = forecast(recipe, wishes, is_asked=True)
    assert [line.partition(" ")[0] for line in lines] == ["d2mora:", "lora:", "4", "6", "time:"]
    assert "2 steps each" in lines[2] and "6 steps each" in lines[3]
    assert lines[4].startswith("time: about ") and "estimated from 2 micro batches" in lines[4]
    assert sorted(made.rglob("*")) == before
    assert steps_in_all(recipe, wishes, matched_arms(recipe, ["d2mora", "lora"]), 6) == 4 * 2 + 6 * 6
