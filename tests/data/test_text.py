"""Documents: learned whole and to the end, in as many rows as they need, with nothing lost or told twice."""

import csv
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from qd2mora.data import Row, TaskMix, TokenRows, collate, encode, prepare, read_pairs
from qd2mora.data.expert_suggestion import suggest_experts
from qd2mora.data.notes import notes
from qd2mora.errors import InputRefused
from qd2mora.recipe import Data, Task

TEXTS = ["red sun blue moon " * 20, "green", "one two three\n\ncat dog " * 9, "bird\r\nstar"]


def save(folder: Path, texts: list[str] = TEXTS, **settings: object) -> Task:
    path = folder / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    return Task(name="t", path=str(path), format="text", **settings)


def whole(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]


@pytest.mark.parametrize("max_length", [8, 9, 33, 512])
def test_every_token_of_a_document_but_its_first_is_learned_once_and_in_order(
    max_length: int, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    (task,) = prepare(Data(tasks=[save(tmp_path)], max_length=max_length), tokenizer, 0)
    wanted = [whole(tokenizer, text) for text in TEXTS]
    rows = list(task.train)
    assert max(len(row.ids) for row in rows) <= max_length and task.num_cut == task.num_dropped == 0
    assert task.lengths.tolist() == [len(row.ids) for row in rows]
    documents: list[list[int]] = []
    for row in rows:
        ids = row.ids.tolist()
        if documents and documents[-1][-1] != tokenizer.eos_token_id:
            assert ids[0] == documents[-1][-1]  # what the row before learned last is given
            documents[-1] += ids[1:]
        else:
            documents.append(ids)
        labels = collate([row], tokenizer.pad_token_id)["labels"][0]
        assert labels[1 : len(ids)].tolist() == ids[1:] and row.num_labels == len(ids) - 1
    assert documents == wanted
    assert sum(row.num_labels for row in rows) == sum(map(len, wanted)) - len(wanted)
    at_once = encode(read_pairs(task.task, task.task.path), tokenizer, 0, max_length, True)
    assert [row.ids.tolist() for row in at_once] == [row.ids.tolist() for row in rows]


def test_whole_documents_are_held_out_and_counted_by_the_limit(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    def parts(**settings: object) -> tuple[list[Row], list[Row]]:
        (task,) = prepare(Data(tasks=[save(tmp_path, **settings)], max_length=16), tokenizer, 3)
        return list(task.train), list(task.validation)

    train, held = parts(validation=2)
    for rows in (train, held):
        assert sum(int(row.ids[-1] == tokenizer.eos_token_id) for row in rows) == 2
    learned = sum(row.num_labels for row in train + held)
    assert learned == sum(len(whole(tokenizer, text)) - 1 for text in TEXTS)
    first, _ = parts(limit=1)
    assert sum(row.num_labels for row in first) == len(whole(tokenizer, TEXTS[0])) - 1
    with pytest.raises(InputRefused, match="4 rows to hold out of 4"):
        parts(validation=4)


def test_a_txt_file_is_one_document_and_other_files_have_one_in_each_text(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    import pyarrow
    import pyarrow.parquet

    def learned(name: str, **settings: object) -> list[int]:
        task = Task(name="t", path=str(tmp_path / name), format="text", **settings)
        return [row.ids.tolist() for row in prepare(Data(tasks=[task], max_length=256), tokenizer, 0)[0].train]

    text = TEXTS[3] + "\n"
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["body"], [text]])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": text}]), tmp_path / "a.parquet")
    for name, fields in (("a.txt", None), ("a.txt.gz", None), ("a.parquet", None), ("a.csv", {"text": "body"})):
        assert learned(name, fields=fields) == [whole(tokenizer, text)]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": " \n"}, "field 'text' is empty, there is nothing to learn"),
        ({"text": 5}, "field 'text' should be text"),
        ({"text": "a\0"}, "NUL"),
        ({"content": "a"}, "no field 'text'; the row has 'content'"),
    ],
)
def test_a_document_that_will_not_do_is_refused_by_its_row_or_left_out_and_counted(
    row: object, words: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    task = save(tmp_path)
    with Path(task.path).open("a", encoding="utf-8") as file:
        file.write("\n" + json.dumps(row))
    with pytest.raises(InputRefused, match=rf"texts\.jsonl, row 5: .*{words}"):
        prepare(Data(tasks=[task]), tokenizer, 0)
    (made,) = prepare(Data(tasks=[task], on_bad_row="skip"), tokenizer, 0)
    assert made.skipped.total == 1 and len(made.train) == 4


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"caf\xe9", "a.txt, row 1: not UTF-8 at byte 3"),
        ("a.txt", b"x" * (8 << 20) + b"y", "longer than 8388608 bytes; several documents are rows of a jsonl file"),
        ("a.txt", b"", "the file is empty"),
    ],
)
def test_a_txt_file_that_is_no_document_is_refused_in_one_line(
    name: str, content: bytes, words: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    task = Task(name="t", path=str(tmp_path / name), format="text")
    with pytest.raises(InputRefused, match=words):
        prepare(Data(tasks=[task]), tokenizer, 0)


def test_keys_that_have_no_place_beside_documents_are_refused_by_name(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    for key, value, words in (("metric", "exact", "judges answers"), ("template", "chatml", "leave it out")):
        task = save(tmp_path).model_copy(update={key: value})
        with pytest.raises(InputRefused, match=rf"data\.tasks\.t\.{key}: {value} .*{words}"):
            prepare(Data(tasks=[task]), tokenizer, 0)
    path = tmp_path / "a.txt"
    path.write_text("red", encoding="utf-8")
    with pytest.raises(InputRefused, match=r"unknown kind of file '\.txt'"):
        prepare(Data(tasks=[Task(name="t", path=str(path))]), tokenizer, 0)


def test_rows_that_go_on_are_said_and_no_open_end_is_claimed(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    (task,) = prepare(Data(tasks=[save(tmp_path)], max_length=16), tokenizer, 0)
    (line,) = notes(task, tokenizer)
    assert line.startswith(
        f"4 documents become {len(task.train)} rows; a row that goes on begins with the token before"
    )
    (task,) = prepare(Data(tasks=[save(tmp_path)], max_length=512), tokenizer, 0)
    assert list(notes(task, tokenizer)) == []


def test_shares_by_tokens_count_the_tokens_of_each_row_of_a_document(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    short = tmp_path / "short"
    short.mkdir()
    tasks = [save(tmp_path, weight=1.0), save(short, ["red"] * 50, weight=3.0).model_copy(update={"name": "u"})]
    data = Data(tasks=tasks, mix="tokens", max_length=16)
    made = prepare(data, tokenizer, 0)
    shares = TaskMix(data, made, 0).shares(400)
    assert [share.of_tokens for share in shares] == pytest.approx([0.25, 0.75], abs=0.01)
    assert shares[0].tokens == sum(len(row.ids) for row in TaskMix(data, made, 0).rows(0, 400) if row.task == 0)


def test_documents_from_the_cache_are_those_that_were_made(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qd2mora.data.token_store.SMALLEST_KEPT", 0)
    monkeypatch.setenv("QD2MORA_CACHE", str(tmp_path / "cache"))
    data = Data(tasks=[save(tmp_path, validation=1)], max_length=16)
    ids = []
    for _ in range(2):
        (task,) = prepare(data, tokenizer, 0)
        assert isinstance(task.train, TokenRows)
        ids.append([row.ids.tolist() for row in (*task.train, *task.validation)])
    assert ids[0] == ids[1]


def test_documents_have_kinds_too(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    texts = [f"{word} " * 30 for word in ("red", "blue") for _ in range(6)]
    tasks = prepare(Data(tasks=[save(tmp_path, texts)], max_length=64), tokenizer, 0)
    assert suggest_experts(tasks, 4, 0).experts == 2
    assert np.all(tasks[0].lengths > 1)
