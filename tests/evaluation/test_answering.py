"""Answering: a row's result is its own, whoever shares its batch, and equals the slow way."""

from pathlib import Path

import asking
import pytest
import torch

from qd2mora.data import Row, prepare
from qd2mora.errors import WillNotFit
from qd2mora.evaluation import Exam, Subject, ask_suite, open_subject
from qd2mora.evaluation.answering import answer_losses, weigh_choices, write_answers
from qd2mora.evaluation.scoring import score_task


def held_out(subject: Subject) -> list[Row]:
    assert subject.run is not None
    rows = [row for task in prepare(subject.run.recipe.data, subject.tokenizer, 0) for row in task.validation]
    assert len({len(row.ids) for row in rows}) > 1  # so that there is padding
    return rows


@pytest.mark.parametrize("beams", [1, 4])
def test_answers_of_a_batch_are_those_of_each_row_alone(beams: int, subject: Subject) -> None:
    rows = held_out(subject)[:7]
    alone = [write_answers(subject, [row], 6, beams)[0] for row in rows]
    assert write_answers(subject, rows, 6, beams) == alone
    assert any(alone)


def test_a_task_routed_adapter_tells_its_beams_their_rows_task(made: Path) -> None:
    subject = open_subject(asking.save_run(made, "by_task", method="moelora"))
    rows = held_out(subject)[5:11]
    assert {row.task for row in rows} == {0, 1}
    alone = [write_answers(subject, [row], 6, 4)[0] for row in rows]
    assert write_answers(subject, rows, 6, 4) == alone


def slow_loss(subject: Subject, row: Row, ids: list[int]) -> float:
    """Negative log-likelihood of `ids` after the prompt, one whole pass for one text, float64."""
    whole = torch.tensor([[*row.ids[: row.masked].tolist(), *ids]])
    labels = whole.clone()
    labels[:, : row.masked] = -100
    subject.route({"task_index": torch.tensor([row.task]), "labels": labels})
    with torch.no_grad():
        logits = subject.plain(whole).logits[0].double()
    places = range(row.masked - 1, whole.shape[1] - 1)
    return -sum(float(logits[place].log_softmax(-1)[whole[0, place + 1]]) for place in places)


@pytest.mark.parametrize("granularity", ["token", "sequence"])
def test_weighed_choices_and_losses_equal_whole_passes_one_by_one(granularity: str, made: Path) -> None:
    gates = f"adapter.gates={{down: {{granularity: {granularity}}}}}"
    subject = open_subject(asking.save_run(made, granularity, gates))
    assert subject.may_fork == (granularity == "token")
    rows = held_out(subject)[:5]
    choices = [[[5, 9, 11], [7], [8, 20 + place]] for place in range(5)]
    weighed = weigh_choices(subject, rows, choices)
    for row, offered, found in zip(rows, choices, weighed, strict=True):
        for ids, each in zip(offered, found, strict=True):
            assert each.tokens == len(ids)
            # float32 forward passes in another order
            assert each.loss == pytest.approx(slow_loss(subject, row, ids), rel=2e-5)
    wanted = [slow_loss(subject, row, row.ids[row.masked :].tolist()) for row in rows]
    assert answer_losses(subject, rows) == pytest.approx(wanted, rel=2e-5)


@pytest.mark.parametrize("scoring", ["generate", "likelihood"])
def test_a_batch_that_has_no_room_is_scored_in_halves_and_a_row_that_has_none_is_told(
    scoring: str, subject: Subject, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (task,) = ask_suite(
        Exam(suite="commonsense", data=made / "suite", tasks=("boolq",), scoring=scoring), subject.tokenizer
    )
    whole, route, sizes = score_task(subject, task), Subject.route, []

    def short(self: Subject, batch: dict[str, torch.Tensor], copies: int = 1) -> None:
        sizes.append(len(batch["input_ids"]))
        if sizes[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        route(self, batch, copies)

    monkeypatch.setattr(Subject, "route", short)
    most = 2
    halved = score_task(subject, task)
    assert max(sizes) == len(task.rows) > most
    assert [record.row for record in halved.records] == list(range(len(task.rows)))
    assert halved.values == whole.values
    assert [record.loss for record in halved.records] == pytest.approx([one.loss for one in whole.records], rel=1e-5)
    most = 0
    with pytest.raises(WillNotFit, match=r"row \d of task boolq"):
        score_task(subject, task)


@pytest.mark.parametrize("scoring", ["generate", "likelihood"])
def test_a_suites_score_does_not_depend_on_the_batch(scoring: str, subject: Subject, made: Path) -> None:
    exam = Exam(suite="commonsense", data=made / "suite", tasks=("boolq", "siqa"), scoring=scoring)
    tasks = ask_suite(exam, subject.tokenizer)
    for task in tasks:
        whole, alone = score_task(subject, task), score_task(subject, task, rows_at_once=1)
        for one, two in zip(whole.records, alone.records, strict=True):
            assert (one.row, one.value, one.text, one.normalized) == (two.row, two.value, two.text, two.normalized)
            assert one.loss == pytest.approx(two.loss, rel=1e-5)
