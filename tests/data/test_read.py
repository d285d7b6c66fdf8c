"""Rows from files: every kind of file, every kind of mistake, named with its place."""

import json
from pathlib import Path

import pytest

from qd2mora.data import Pair, read_pairs
from qd2mora.data.instruction import split
from qd2mora.errors import InputRefused
from qd2mora.recipe import Task

ROWS = [
    {"instruction": "Add.", "input": "1 {2}", "output": "3", "kind": "a"},
    {"instruction": "Say {input}.", "input": "", "output": "007", "kind": "b"},
]
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request. \n\n                ### Instruction:\n                Add.\n"
    "                \n                ### Input:\n                1 {2}\n                \n"
    "                ### Response:\n                "
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.  \n\n"
    "                ### Instruction:\n                Say {input}.\n                \n"
    "                ### Response:\n                "
)


def task(path: Path, **changes: object) -> Task:
    return Task(name="t", path=str(path), **changes)


def read(path: Path, **changes: object) -> list[Pair]:
    return read_pairs(task(path, **changes), str(path))


def refusal(path: Path, **changes: object) -> str:
    with pytest.raises(InputRefused) as caught:
        read(path, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_prompt_is_that_of_llm_adapters_byte_for_byte() -> None:
    assert split(ROWS[0]) == (WITH_INPUT, "3")
    assert split(ROWS[1]) == (WITHOUT_INPUT, "007")


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    import datasets

    (tmp_path / "a.json").write_text(json.dumps(ROWS), encoding="utf-8")
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n", encoding="utf-8")
    (tmp_path / "c.json").write_text("\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    (tmp_path / "d.json").write_text("\ufeff" + json.dumps(ROWS), encoding="utf-8")
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "e.parquet")
    lines = ["instruction,input,output,kind"] + [",".join(row.values()) for row in ROWS]
    (tmp_path / "f.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    wanted = [Pair(WITH_INPUT, "3"), Pair(WITHOUT_INPUT, "007")]
    for path in sorted(tmp_path.iterdir()):
        assert read(path) == wanted, path.name


def test_rows_are_limited_and_selected(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(ROWS * 3), encoding="utf-8")
    assert len(read(path, limit=2)) == 2
    assert [pair.answer for pair in read(path, select={"kind": "b"})] == ["007"] * 3
    assert "no rows" in refusal(path, select={"kind": "z"})
    assert "no field 'sort'" in refusal(path, select={"sort": "b"})


def test_completion_rows_are_taken_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a ", "completion": "b"}\n', encoding="utf-8")
    assert read(path, format="completion") == [Pair("a ", "b")]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", b"", "empty"),
        ("a.json", b"[]", "no rows"),
        ("a.json", b'[{"instruction": "x",\n "output": }]', "line 2: not JSON"),
        ("a.json", b'{"instruction": "x"}', "a list of rows"),
        ("a.json", b'["x"]', "row 1: a row is an object"),
        ("a.jsonl", b'{"instruction": "x", "output": "y"}\nnot json\n', "line 2: not JSON"),
        ("a.jsonl", b'{"instruction": "x", "output": "y"}\n{"instruction": "x"}\n', "row 2: no field 'output'"),
        ("a.jsonl", b'{"instruction": "x", "output": 5}', "row 1: field 'output' should be text"),
        ("a.jsonl", b'{"instruction": "x", "input": 5, "output": "y"}', "row 1: field 'input' should be text"),
        ("a.jsonl", b'{"instruction": "x", "output": "  "}', "row 1: field 'output' is empty"),
        ("a.jsonl", b'{"instruction": " ", "output": "x"}', "row 1: field 'instruction' is empty"),
        ("a.jsonl", b'{"instruction": "\xff"}', "not UTF-8"),
        ("a.csv", b"a,b\n1,2\n", "row 1: no field 'instruction'"),
        ("a.parquet", b"nothing", "not a parquet file"),
        ("a.txt", b"x", "unknown kind of file '.txt'"),
        ("a.json", b"[" * 100_000, "nested"),
    ],
)
def test_a_broken_file_is_named_with_the_place(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    message = refusal(path)
    assert words in message and str(path) in message


def test_paths_and_formats_that_are_not_there_are_named(tmp_path: Path) -> None:
    assert "no file" in refusal(tmp_path / "nothing.json")
    assert "folder" in refusal(tmp_path)
    (tmp_path / "a.json").write_text(json.dumps(ROWS), encoding="utf-8")
    assert "did you mean 'instruction'" in refusal(tmp_path / "a.json", format="instructions")
