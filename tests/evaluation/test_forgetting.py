"""What a run gained and forgot: paired changes, the matrix of runs in sequence, and tasks asked together."""

import json
import sys
from pathlib import Path

import asking
import numpy as np
import pytest
import tiny

from qd2mora.base import load_base, load_tokenizer
from qd2mora.cli import main
from qd2mora.errors import InputRefused
from qd2mora.evaluation import EvalOptions, Exam, Record, Score, Subject, evaluate
from qd2mora.evaluation import composite as composite_prompts
from qd2mora.evaluation.change import BASE, Change, change_of, evaluate_against
from qd2mora.evaluation.composite import evaluate_composite, split_answers
from qd2mora.evaluation.sequence import RunsInTurn, evaluate_sequence
from qd2mora.mixture import MixtureConfig, add_adapter
from qd2mora.recipe import Base


def score_of(values: list[float], metric: str = "exact") -> Score:
    return Score(metric, tuple(Record(row, value, value, 1) for row, value in enumerate(values)))


def test_a_change_is_paired_row_by_row_and_tells_what_was_lost_and_won() -> None:
    before, now = [1.0] * 60 + [0.0] * 40, [0.0] * 10 + [1.0] * 52 + [0.0] * 38
    found = change_of(score_of(before), score_of(now))
    assert (found.lost, found.won, found.change) == (10, 2, pytest.approx(-0.08))
    differences = np.array(now) - np.array(before)
    half = 1.96 * differences.std() / 10
    assert found.interval == pytest.approx((-0.08 - half, -0.08 + half), abs=0.015)
    assert found.verdict == "forgotten" and change_of(score_of(now), score_of(before)).verdict == "gained"
    # Unpaired, two shares of 100 rows are never sure of a difference of eight rows.
    assert score_of(before).interval[0] < score_of(now).interval[1]
    assert change_of(score_of([2.0, 3.0], "loss"), score_of([1.0, 1.0], "loss")).verdict == "gained"
    assert change_of(score_of(before), score_of(before)).verdict == ""


def test_a_run_is_compared_with_its_base_and_with_another_run(made: Path, tmp_path: Path) -> None:
    run, later = made / "run", asking.save_run(made, "later", "train.seed=7", "train.learning_rate=3e-2")
    losses = Exam(limit=4)
    with_itself = evaluate_against(run, str(run), losses)
    assert all(each.change == 0 and each.interval == (0, 0) for each in with_itself.values())
    changes = evaluate_against(later, str(run), losses, EvalOptions(out=tmp_path / "changes.json"))
    now, before = evaluate(later, losses), evaluate(run, losses)
    for task, change in changes.items():
        assert (change.now, change.before) == (now[task].mean, before[task].mean)
    assert json.loads((tmp_path / "changes.json").read_text(encoding="utf-8")).keys() == changes.keys()
    assert evaluate_against(later, str(run), losses, EvalOptions(out=tmp_path / "changes.json")) == changes
    with pytest.raises(InputRefused, match="holds answers to another question"):
        evaluate_against(later, BASE, losses, EvalOptions(out=tmp_path / "changes.json"))


@pytest.mark.parametrize("method", ["dora", "flylora"])
def test_what_was_frozen_is_frozen_after_the_adapter_was_off(method: str, tmp_path: Path) -> None:
    base = Base(model=str(tiny.save_base(tmp_path)), quantization="none")
    config = MixtureConfig(method=method, rank=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    subject = Subject(add_adapter(load_base(base), config, 0), load_tokenizer(base.model))
    before = {name: tensor.requires_grad for name, tensor in subject.model.named_parameters()}
    assert {trained for name, trained in before.items() if "lora_" in name or "mixture_" in name} == {True, False}
    with subject.without_adapter():
        pass
    assert {name: tensor.requires_grad for name, tensor in subject.model.named_parameters()} == before
    subject.model.requires_grad_(False)
    with subject.without_adapter():
        pass
    assert not any(tensor.requires_grad for tensor in subject.model.parameters())


def test_the_base_of_a_run_is_the_run_with_its_adapter_off(made: Path, subject: Subject) -> None:
    from qd2mora.data import prepare
    from qd2mora.evaluation import ask_held_out, score_all

    assert subject.run is not None
    data = subject.run.recipe.data
    named = data.model_copy(update={"tasks": [task.model_copy(update={"metric": "loss"}) for task in data.tasks]})
    recipe = subject.run.recipe.model_copy(update={"data": named})
    changes = evaluate_against(made / "run", BASE, Exam(recipe=recipe))
    asked = ask_held_out(prepare(named, subject.tokenizer, 0))
    with subject.without_adapter():
        off = score_all(subject, asked)
    for task, change in changes.items():
        assert change.before == pytest.approx(off[task].mean, abs=1e-6)
        assert abs(change.change) > 1e-3
    with pytest.raises(InputRefused, match="has no adapter to turn off"):
        evaluate_against(made / "base", BASE, Exam(recipe=recipe))


def test_backward_transfer_and_forgetting_are_those_of_the_matrix() -> None:
    rows = {"a": ([1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]), "b": ([0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0])}
    scores = [{task: score_of([float(each) for each in rows[task][run]]) for task in rows} for run in range(3)]
    found = RunsInTurn(["one", "two", "three"], scores, {"a": 0, "b": 1})
    # a: 0.5 -> 0.25, at best 0.75; b: 0.25 -> 0.5, at best 0.25.
    assert found.backward_transfer == pytest.approx((-0.25 + 0.25) / 2)
    assert found.forgetting == pytest.approx((0.5 - 0.25) / 2)
    as_losses = [{task: score_of(list(score.values), "loss") for task, score in each.items()} for each in scores]
    turned = RunsInTurn(found.runs, as_losses, found.learned)
    assert turned.backward_transfer == pytest.approx(-found.backward_transfer)
    assert turned.forgetting == pytest.approx((0.25 - 0.5 + 0.5 - 0.25) / 2)


def test_runs_in_sequence_are_asked_the_tasks_of_all(made: Path, tmp_path: Path) -> None:
    later = asking.save_run(made, "later", "train.seed=7", "train.learning_rate=3e-2")
    found = evaluate_sequence([str(made / "run"), str(later)], 4, EvalOptions(out=tmp_path / "matrix.json"))
    for run, scores in zip((made / "run", later), found.scores, strict=True):
        # The rows are those that the run which learned the task holds out.
        assert scores == evaluate(run, Exam(recipe=made / "run" / "recipe.yaml", limit=4))
    assert found.learned == {"first": 0, "last": 0}
    assert "summary" in json.loads((tmp_path / "matrix.json").read_text(encoding="utf-8"))
    with pytest.raises(InputRefused, match=r"--sequence: .*name two or more different runs"):
        evaluate_sequence([str(later), str(later)])
    with pytest.raises(InputRefused, match="is not a run"):
        evaluate_sequence([str(made / "base"), str(later)])
    with pytest.raises(InputRefused, match="--beams: 4 does not go with --sequence"):
        evaluate_sequence([str(made / "run"), str(later)], how=EvalOptions(beams=4))


def test_answers_are_told_apart_by_the_numbers_that_open_their_lines() -> None:
    assert split_answers("1. red\n2. blue sun\n3) 4. moon", 3) == ["red", "blue sun", "4. moon"]
    assert split_answers("red\n 2: blue", 3) == [None, "blue", None]
    assert split_answers("1. 2. red", 2) == ["2. red", None]


def test_tasks_of_one_prompt_are_judged_each_by_its_own_answer(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = []

    def written(subject: Subject, rows: list, longest: int) -> list[str]:
        """The right answers, of every second prompt the first alone."""
        prompts.extend(row.pair.prompt for row in rows)
        return [row.pair.answer if place % 2 else row.pair.answer.split("\n")[0] for place, row in enumerate(rows)]

    monkeypatch.setattr(composite_prompts, "write_answers", written)
    found = evaluate_composite(made / "run", Exam(), 2)
    assert "Say the first word" in prompts[0].split("2. ")[0] and "Say the last word" in prompts[0].split("2. ")[1]
    assert "Say the last word" in prompts[1].split("2. ")[0]
    # Of eight prompts four are whole; of the others the first place alone was answered, by `first` as they are even.
    assert (found["first"].attempted, found["first"].right) == (8, 8)
    assert (found["last"].attempted, found["last"].right, found["last"].by_place) == (4, 4, (1.0, 0.0))
    monkeypatch.undo()
    monkeypatch.setattr(sys, "argv", ["qd2mora", "eval", str(made / "run"), "--composite", "3"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "--composite: 3 tasks that write an answer are wanted and 2 hold out rows" in capsys.readouterr().err


def test_the_verb_prints_changes_and_takes_one_question_at_a_time(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["qd2mora", "eval", str(made / "run"), "--limit", "2", "--against", "base"]
    for more, code in (([], 0), (["--json"], 0), (["--composite", "2"], 2)):
        monkeypatch.setattr(sys, "argv", [*command, *more])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        assert ended.value.code == code, printed.err
        if more == ["--json"]:
            assert json.loads(printed.out)["first"].keys() >= {"before", "now", "change", "interval", "verdict"}
    assert "--composite: is asked alone; leave out --against" in printed.err


@pytest.mark.filterwarnings("ignore")
def test_numbers_of_the_harness_change_by_the_difference_of_their_means(made: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from test_harness import TASK

    from qd2mora.evaluation.harness import harness_changes, run_harness

    rows = [{"text": f"Say the first word: {word} blue", "label": place % 2} for place, word in enumerate("abcdef")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    more = 'doc_to_choice: ["red", "green"]\nmetric_list: [{metric: acc}]'
    text = TASK.format(path=tmp_path / "rows.jsonl", kind="multiple_choice", target="label", more=more)
    (tmp_path / "colours.yaml").write_text(text, encoding="utf-8")
    found = harness_changes(str(made / "run"), BASE, ["colours"], folder=tmp_path)
    now = run_harness(made / "run", ["colours"], folder=tmp_path)["colours"]["acc,none"]
    assert found.keys() == {"colours acc"}
    change = found["colours acc"]
    assert isinstance(change, Change) and change.now == now and change.rows == 6
    assert change.interval[0] <= change.change <= change.interval[1]
