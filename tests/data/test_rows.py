"""From text to tokens to batches: the boundary, the cuts, the order, the padding."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from transformers import PreTrainedTokenizerBase

from qd2mora.base.passes import IGNORE
from qd2mora.data import Pair, Row, TaskMix, TaskRows, collate, encode, prepare, share_lines
from qd2mora.data.tokenise import Tokeniser
from qd2mora.errors import InputRefused
from qd2mora.recipe import Data, Task


@pytest.fixture
def files(tmp_path: Path) -> Path:
    tiny.save_tasks(tmp_path, 40)
    return tmp_path


def data(files: Path, **changes: object) -> Data:
    tasks = [Task(name=name, path=str(files / f"{name}.jsonl"), validation=8) for name in ("first", "last")]
    return Data(**({"tasks": tasks} | changes))


def test_what_is_masked_is_the_prompt_and_what_is_learned_the_answer_with_its_end(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    (row,) = encode([Pair("red sun ", "moon star")], tokenizer, 0, 64, True)
    assert tokenizer.decode(row.ids[: row.masked]) == "<s>red sun "
    assert tokenizer.decode(row.ids[row.masked :]) == "moon star</s>"
    assert row.num_labels == len(row.ids) - row.masked


def test_without_masking_everything_but_the_first_token_is_learned(tokenizer: PreTrainedTokenizerBase) -> None:
    (row,) = encode([Pair("red ", "sun")], tokenizer, 0, 64, False)
    assert row.num_labels == len(row.ids) - 1


def test_long_rows_lose_their_end_and_are_counted_or_dropped(tokenizer: PreTrainedTokenizerBase, files: Path) -> None:
    whole = prepare(data(files), tokenizer, 0)[0]
    longest = max(len(row.ids) for row in whole.train)
    cut = prepare(data(files, max_length=longest - 1), tokenizer, 0)[0]
    assert cut.num_cut == sum(len(row.ids) == longest for row in whole.train) > 0
    shortest_prompt = min(row.masked for row in whole.train)
    with pytest.raises(InputRefused, match="every label is masked"):
        prepare(data(files, max_length=max(8, shortest_prompt)), tokenizer, 0)


def test_held_out_rows_are_disjoint_and_depend_on_seed_and_name_alone(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    lines = [json.dumps({"instruction": f"q{n}", "output": f"a{n}"}) for n in range(50)]
    path = tmp_path / "numbers.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")

    def held(names: list[str], seed: int) -> dict[str, set[str]]:
        tasks = prepare(Data(tasks=[Task(name=name, path=str(path), validation=10) for name in names]), tokenizer, seed)
        for task in tasks:
            train, validation = ({row.pair.answer for row in rows} for rows in (task.train, task.validation))
            assert len(train) == 40 and len(validation) == 10 and not train & validation
        return {task.task.name: {row.pair.answer for row in task.validation} for task in tasks}

    both = held(["x", "y"], 0)
    assert held(["y"], 0)["y"] == both["y"] != both["x"]
    assert held(["y"], 1)["y"] != both["y"]
    with pytest.raises(InputRefused, match="leave none"):
        prepare(Data(tasks=[Task(name="x", path=str(path), validation=50)]), tokenizer, 0)


def made_tasks(sizes: list[int], lengths: list[int], weights: list[float | None]) -> tuple[Data, list[TaskRows]]:
    tasks = [Task(name=f"t{n}", path="x", weight=weight) for n, weight in enumerate(weights)]
    rows = [
        TaskRows(
            task,
            train=[Row(n, np.arange(length + i % 3, dtype=np.int32), 1, Pair(str(i), "")) for i in range(size)],
        )
        for n, (task, size, length) in enumerate(zip(tasks, sizes, lengths, strict=True))
    ]
    return Data(tasks=tasks), rows


def test_without_weights_every_epoch_is_everything_once() -> None:
    settings, tasks = made_tasks([5, 8], [4, 4], [None, None])
    mixture = TaskMix(settings, tasks, 0)
    epochs = [[(row.task, row.pair.prompt) for row in mixture.rows(13 * n, 13)] for n in range(3)]
    assert all(len(set(epoch)) == 13 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_weights_are_kept_to_within_a_row_by_rows_and_one_percent_by_tokens() -> None:
    settings, tasks = made_tasks([50, 7, 20], [10, 40, 90], [1.0, 2.0, 5.0])
    for count in (8, 80, 801):
        rows = TaskMix(settings, tasks, 0).rows(0, count)
        for number, weight in enumerate((1, 2, 5)):
            assert abs(sum(row.task == number for row in rows) - count * weight / 8) <= 1
    rows = TaskMix(settings.model_copy(update={"mix": "tokens"}), tasks, 0).rows(0, 3000)
    total = sum(len(row.ids) for row in rows)
    for number, weight in enumerate((1, 2, 5)):
        assert abs(sum(len(row.ids) for row in rows if row.task == number) / total - weight / 8) < 0.01


@pytest.mark.parametrize("mix", ["rows", "tokens"])
def test_realised_shares_are_told_and_within_one_percent_of_the_asked_ones(mix: str) -> None:
    settings, tasks = made_tasks([300, 40, 120], [30, 300, 90], [3.0, 1.0, 1.5])
    mixture = TaskMix(settings.model_copy(update={"mix": mix}), tasks, 0)
    shares = mixture.shares(2000)
    rows = mixture.rows(0, 2000)
    for number, share in enumerate(shares):
        mine = [row for row in rows if row.task == number]
        assert (share.rows, share.tokens) == (len(mine), sum(len(row.ids) for row in mine))
        assert share.asked is not None
        assert abs((share.of_rows if mix == "rows" else share.of_tokens) - share.asked) < 0.01
    lines = list(share_lines(shares, mix == "tokens"))
    assert lines[0].startswith("task t0: 54.") and f"asked 54.5% of {mix}" in lines[0]


@pytest.mark.parametrize(("stop", "rows"), [("first", 8 * 4 - 3), ("last", 20 * 4)])
def test_a_run_may_end_with_the_first_or_the_last_task(stop: str, rows: int) -> None:
    settings, tasks = made_tasks([8, 60], [4, 4], [1.0, 3.0])
    mixture = TaskMix(settings.model_copy(update={"stop": stop}), tasks, 0)
    count = mixture.rows_until_stop()
    assert abs(count - rows) <= 3
    seen = [[row.pair.prompt for row in mixture.rows(0, count) if row.task == task] for task in (0, 1)]
    ended = 0 if stop == "first" else 1
    assert len(seen[ended]) == len(set(seen[ended])) == len(tasks[ended].train)
    assert mixture.rows(count - 1, 1)[0].task == ended


def test_each_task_may_have_its_own_epochs() -> None:
    settings, tasks = made_tasks([10, 6], [4, 4], [None, None])
    own = [1.0, 2.5]
    for task, epochs in zip(tasks, own, strict=True):
        task.task = task.task.model_copy(update={"epochs": epochs})
    mixture = TaskMix(settings, tasks, 0)
    assert mixture.rows_per_epoch == 10 + 15
    halves = []
    for epoch in range(2):
        rows = [(row.task, row.pair.prompt) for row in mixture.rows(25 * epoch, 25)]
        counts = {each: rows.count(each) for each in set(rows)}
        assert all(counts[0, str(number)] == 1 for number in range(10))
        assert sorted(counts[1, str(number)] for number in range(6)) == [2, 2, 2, 3, 3, 3]
        halves.append({number for number in range(6) if counts[1, str(number)] == 3})
    assert halves[0] != halves[1]
    with_weights, tasks = made_tasks([10, 6], [4, 4], [1.0, 1.0])
    tasks[1].task = tasks[1].task.model_copy(update={"epochs": 3.0})
    mixture = TaskMix(with_weights.model_copy(update={"stop": "last"}), tasks, 0)
    assert 34 <= mixture.rows_until_stop() <= 36


@pytest.mark.parametrize("weights", [[None, None], [1.0, 3.0]])
def test_the_order_is_the_same_however_it_is_asked_for(weights: list[float | None]) -> None:
    settings, tasks = made_tasks([5, 8], [4, 6], weights)
    whole = TaskMix(settings, tasks, 3).rows(0, 40)
    other = TaskMix(settings, tasks, 3)
    assert [row for start in range(0, 40, 8) for row in other.rows(start, 8)] == whole
    assert TaskMix(settings, tasks, 3).rows(30, 10) == whole[30:]
    assert TaskMix(settings, tasks, 4).rows(0, 40) != whole


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_masked_by_position_even_where_it_is_the_end_token(side: str) -> None:
    end = 2
    rows = [
        Row(0, np.array([1, 5, 6, end], dtype=np.int32), 2, Pair("", "")),
        Row(1, np.array([1, 7, end], dtype=np.int32), 1, Pair("", "")),
    ]
    batch = collate(rows, end, multiple=8, side=side)
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {
        "input_ids": (2, 8),
        "attention_mask": (2, 8),
        "labels": (2, 8),
        "task_index": (2,),
        "group": (2,),
    }
    for number, row in enumerate(rows):
        attended = batch["attention_mask"][number].bool()
        assert batch["input_ids"][number][attended].tolist() == row.ids.tolist()
        labels = batch["labels"][number]
        assert labels[attended].tolist() == [IGNORE] * row.masked + row.ids[row.masked :].tolist()
        assert (labels[~attended] == IGNORE).all()
    assert torch.equal(batch["task_index"], torch.tensor([0, 1]))


def test_tasks_and_runs_of_a_process_share_one_tokenizer_of_the_library(tokenizer: PreTrainedTokenizerBase) -> None:
    """Its threads never forget one that they served, so that one each would be a leak."""
    first, second = Tokeniser(tokenizer), Tokeniser(tokenizer)
    assert first._fast is second._fast is not None
