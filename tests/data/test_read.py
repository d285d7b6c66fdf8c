"""Rows from files: every kind of file, every kind of mistake, named with its place."""

import gzip
import json
from pathlib import Path

import pytest

from qd2mora.data import Pair, file_rows, read_pairs
from qd2mora.data.file_rows import BadRow, rows_of
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
    wanted = [Pair(WITH_INPUT, "3", starts_word=True), Pair(WITHOUT_INPUT, "007", starts_word=True)]
    for path in sorted(tmp_path.iterdir()):
        assert read(path) == wanted, path.name


def test_one_row_a_list_under_data_packed_files_and_capitals_just_work(tmp_path: Path) -> None:
    two, lines = json.dumps(ROWS), "\n".join(json.dumps(row) for row in ROWS)
    rows_of_csv = "instruction,input,output\n" + "\n".join(",".join(list(row.values())[:3]) for row in ROWS)
    both = {
        "data.json": json.dumps({"data": ROWS}),
        "A.JSON": two,
        "B.JSONL": lines,
        "C.Csv": rows_of_csv,
        "d.json.gz": two,
        "e.jsonl.gz": lines,
        "f.JSONL.GZ": lines,
        "g.csv.gz": rows_of_csv,
        "h.json.gz": json.dumps({"data": ROWS}),
        "i.json.gz": lines,
    }
    for name, text in both.items():
        content = text.encode()
        (tmp_path / name).write_bytes(gzip.compress(content, mtime=0) if name.lower().endswith(".gz") else content)
        assert [pair.answer for pair in read(tmp_path / name)] == ["3", "007"], name
    for name in ("one.json", "one.json.gz"):
        content = json.dumps(ROWS[0]).encode()
        (tmp_path / name).write_bytes(gzip.compress(content, mtime=0) if name.endswith(".gz") else content)
        assert [pair.answer for pair in read(tmp_path / name)] == ["3"], name
    (tmp_path / "talk.json").write_text(json.dumps({"prompt": "x", "data": ["a"], "completion": "y"}), encoding="utf-8")
    assert read(tmp_path / "talk.json", format="completion") == [Pair("x", "y")]


def test_a_packed_list_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_rows, "MAX_UNPACKED_BYTES", 1000)
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(json.dumps(ROWS * 20).encode(), mtime=0))
    assert "unpacks to more than 1000 bytes" in refusal(tmp_path / "a.json.gz")


def test_a_long_field_of_csv_is_read_and_one_that_is_too_long_costs_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f'instruction,output\n"{"x " * 200_000}",1\n', encoding="utf-8")
    assert [pair.answer for pair in read(path)] == ["1"]
    monkeypatch.setattr(file_rows, "MAX_ROW_BYTES", 300)
    long = [
        '"' + "x" * 500 + '"',
        '"' + 'a ""quoted"" line,\n' * 40 + '"',
        "x" * 301,
        "x" * 5000,
        '"' + "\n" * 400 + '"',
    ]
    for field in long:
        for end in ("\n", "\r\n"):
            text = f"instruction,output\nfirst,1\n{field},2\nthird,3\n".replace("\n", end)
            path.write_text(text, encoding="utf-8", newline="")
            places = [(place, row) for place, row in rows_of(str(path), task(path))]
            assert [place for place, _ in places] == ["row 1", "row 2", "row 3"], field[:20]
            assert isinstance(places[1][1], BadRow) and "longer than 300 letters" in str(places[1][1])
            assert places[2][1] == {"instruction": "third", "output": "3"}
    path.write_text(f'instruction,output\nfirst,1\n"{"never closed, " * 100},2\nthird,3\n', encoding="utf-8")
    assert "not a csv file: longer than 300 letters" in refusal(path)


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
        ("a.json", b'{"instruction": "x"}', "row 1: no field 'output'"),
        ("a.json", b'"x"', "a list of rows"),
        ("a.json", b'{"instruction": "x", "instruction": "y", "output": "z"}', "row 1: "),
        ("a.json", b'{"data": "x"}', "row 1: no field 'instruction'"),
        ("a.json", b'{"version": 1, "data": []}', "row 1: no field 'instruction'"),
        ("a.jsonl.gz", b'{"instruction": "x", "output": "y"}', "not a whole gzip file"),
        ("a.json.gz", gzip.compress(b'[{"instruction": "x", "output": "y"}]', mtime=0)[:-9], "not a whole gzip file"),
        ("a.parquet.gz", b"x", "unknown kind of file '.parquet.gz'"),
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
