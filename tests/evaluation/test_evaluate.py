"""Evaluation from the outside: metrics of a recipe's tasks, files that outlive a kill, the command line."""

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from test_cli import run as run_cli

from qd2mora.data import prepare
from qd2mora.errors import InputRefused
from qd2mora.evaluation import (
    EvalOptions,
    Exam,
    Record,
    Score,
    Subject,
    ask_held_out,
    bootstrap,
    evaluate,
    score_all,
    score_task,
)
from qd2mora.evaluation.score import wilson
from qd2mora.recipe import load_recipe
from qd2mora.training.held_out import score_together


def with_metrics(made: Path, folder: Path, first: str, last: str) -> Path:
    settings = load_recipe(made / "run.yaml", [f"data.tasks.0.metric={first}", f"data.tasks.1.metric={last}"])
    path = folder / "asked.yaml"
    path.write_text(settings.dump_yaml(), encoding="utf-8")
    return path


def test_each_task_is_scored_by_its_own_metric(made: Path, subject: Subject, tmp_path: Path) -> None:
    recipe = with_metrics(made, tmp_path, "choice", "loss")
    scores = evaluate(made / "run", Exam(recipe))
    assert {name: score.metric for name, score in scores.items()} == {"first": "choice", "last": "loss"}
    assert scores["last"].mean == scores["last"].loss
    low, high = scores["last"].interval
    assert low < scores["last"].mean < high
    assert {record.text for record in scores["first"].records} <= set(
        row.pair.answer for row in prepare(load_recipe(recipe).data, subject.tokenizer, 0)[0].train
    )
    exact = evaluate(made / "run")
    assert {score.metric for score in exact.values()} == {"exact"}
    # the loss of the right answer is the same whatever else is asked
    assert exact["last"].loss == pytest.approx(scores["last"].loss, rel=1e-6)


def test_rouge_is_the_librarys(made: Path, subject: Subject, tmp_path: Path) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    settings = load_recipe(with_metrics(made, tmp_path, "rouge", "exact"))
    task, _ = ask_held_out(prepare(settings.data, subject.tokenizer, 0))
    score = score_task(subject, task)
    measure = RougeScorer(["rougeL"], use_stemmer=True)
    for record, label in zip(score.records, task.labels, strict=True):
        assert record.value == measure.score(label, record.text)["rougeL"].fmeasure
    assert not score.is_share


def test_too_many_different_answers_are_no_choice(made: Path, subject: Subject, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("qd2mora.evaluation.questions.MOST_CHOICES", 2)
    settings = load_recipe(with_metrics(made, tmp_path, "choice", "exact"))
    with pytest.raises(InputRefused, match=r"data.tasks.first.metric: choice .*limit 2"):
        ask_held_out(prepare(settings.data, subject.tokenizer, 0))


def test_an_evaluation_that_was_killed_goes_on_and_ends_the_same(made: Path, tmp_path: Path, monkeypatch) -> None:
    exam = Exam(suite="commonsense", data=made / "suite", tasks=("boolq", "siqa"))
    evaluate(made / "run", exam, EvalOptions(rows_at_once=2, out=tmp_path / "whole.json"))
    calls = []
    import qd2mora.evaluation.scoring as scoring

    write = scoring.write_answers

    def killed_at_the_fourth(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return write(*arguments)

    monkeypatch.setattr(scoring, "write_answers", killed_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        evaluate(made / "run", exam, EvalOptions(rows_at_once=2, out=tmp_path / "broken.json"))
    assert not (tmp_path / "broken.json").exists()
    rows = tmp_path / "broken.rows.jsonl"
    rows.write_bytes(rows.read_bytes() + b'{"task": "si')  # a line cut short
    monkeypatch.setattr(scoring, "write_answers", lambda *arguments: calls.append(2) or write(*arguments))
    evaluate(made / "run", exam, EvalOptions(rows_at_once=2, out=tmp_path / "broken.json"))
    assert calls.count(2) == 3  # six batches in all, three of them kept
    read = [json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8")) for name in ("whole", "broken")]
    assert read[0] == read[1]
    with pytest.raises(InputRefused, match=r"another question .task siqa changed"):
        evaluate(made / "run", replace(exam, limit=5, tasks=("siqa",)), EvalOptions(out=tmp_path / "broken.json"))
    with pytest.raises(InputRefused, match="model changed"):
        evaluate(made / "base", exam, EvalOptions(rows_at_once=2, out=tmp_path / "broken.json"))


def test_the_command_line_asks_a_suite_of_a_run_and_a_base(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = ["--suite", "commonsense", "--data", made / "suite", "--tasks", "siqa"]
    assert run_cli(monkeypatch, "eval", made / "run", *suite, "--scoring", "likelihood", "--json") == 0
    score = json.loads(capsys.readouterr().out)["siqa"]
    assert score["rows"] == 6 and {"accuracy", "accuracy_normalized", "interval", "loss"} <= score.keys()
    assert run_cli(monkeypatch, "eval", made / "base", *suite, "--beams", 2, "--out", tmp_path / "scores.json") == 0
    assert "right answers, 6 rows a task" in capsys.readouterr().out
    assert json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))["siqa"]["metric"] == "extract"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--suite", "commonsense"], "--data: say in which folder"),
        (["--suite", "comonsense", "--data", "."], "did you mean 'commonsense'"),
        (["--suite", "commonsense", "--data", "{made}/suite"], "holds no piqa.json"),
        (["--suite", "commonsense", "--data", "{made}/suite", "--tasks", "bolq"], "did you mean 'boolq'"),
        (["--suite", "commonsense", "--data", ".", "--scoring", "guess"], "--scoring: 'guess'"),
        (["--suite", "commonsense", "--data", ".", "--recipe", "x.yaml"], "not both"),
        (["--scoring", "likelihood"], "data.tasks.0.metric=choice"),
        (["--tasks", "frist"], "there are first, last"),
    ],
)
def test_what_cannot_be_asked_is_one_line(
    arguments: list[str], words: str, made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(monkeypatch, "eval", made / "run", *(each.format(made=made) for each in arguments)) == 2
    err = capsys.readouterr().err
    assert words in err and err.startswith("error: ") and err.count("\n") == 1


def test_intervals_are_wilsons_and_the_bootstraps() -> None:
    # Brown, Cai, DasGupta 2001: the interval of 0 of n is [0, z^2 / (n + z^2)]
    assert wilson(0, 20) == pytest.approx((0, 1.96**2 / (20 + 1.96**2)))
    values = np.random.default_rng(0).normal(3, 2, 400)
    low, high = bootstrap(values.tolist())
    # the normal theory's interval, within what 2,000 resamples resolve
    half = 1.96 * values.std() / math.sqrt(400)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.05)
    assert bootstrap(values.tolist()) == (low, high)
    records = tuple(Record(place, 0.5 + place / 8, 2.0, place + 1) for place in range(3))
    assert Score("rouge", records).interval == bootstrap([0.5, 0.625, 0.75])
    assert Score("loss", records).mean == 1.0


def test_a_task_keeps_its_number_where_a_recipe_lists_the_tasks_in_another_order(made: Path, tmp_path: Path) -> None:
    import asking

    run = asking.save_run(made, "by_task", method="moelora")
    settings = load_recipe(made / "by_task.yaml")
    tasks = list(reversed(settings.data.tasks))
    path = tmp_path / "reversed.yaml"
    data = settings.data.model_copy(update={"tasks": tasks})
    path.write_text(settings.model_copy(update={"data": data}).dump_yaml(), encoding="utf-8")
    wanted, found = evaluate(run), evaluate(run, Exam(path))
    assert {name: score.loss for name, score in found.items()} == {name: score.loss for name, score in wanted.items()}
    tasks[0] = tasks[0].model_copy(update={"name": "unseen"})
    data = settings.data.model_copy(update={"tasks": tasks})
    path.write_text(settings.model_copy(update={"data": data}).dump_yaml(), encoding="utf-8")
    with pytest.raises(InputRefused, match=r"not trained on 'unseen'; its tasks are first, last"):
        evaluate(run, Exam(path))


@dataclass
class Part:
    """One process of several: sums come to it later."""

    index: int
    count: int
    said: list[float] = field(default_factory=list)

    def sum_numbers(self, numbers: list[float]) -> list[float]:
        self.said += numbers
        return numbers


def test_processes_ask_each_row_once_and_their_sum_is_what_one_process_finds(subject: Subject) -> None:
    assert subject.run is not None
    asked = ask_held_out(prepare(subject.run.recipe.data, subject.tokenizer, 0))
    assert {task.metric for task in asked} != {"loss"}
    whole = score_all(subject, asked)
    parts = [Part(index, 2) for index in range(2)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("qd2mora.training.held_out.ROWS_AT_ONCE", 3)
        for part in parts:
            score_together(subject, asked, part)
    wanted = [number for score in whole.values() for each in score.records for number in (each.value, each.loss)]
    sums = [one + two for one, two in zip(parts[0].said, parts[1].said, strict=True)]
    assert [number for place, number in enumerate(sums) if place % 3 < 2] == pytest.approx(wanted, rel=1e-5)
    labels = [part.said[2::3] for part in parts]
    assert all((one > 0) != (two > 0) for one, two in zip(*labels, strict=True)) and all(map(any, labels))
    alone = score_together(subject, asked, Part(0, 1))
    assert {name: score.mean for name, score in alone.items()} == {name: score.mean for name, score in whole.items()}
