"""Formats and sources beyond the plain ones: choices, the file's own names, arrow files, hub data sets."""

import json
import re
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from qd2mora.data import FORMATS, Pair, prepare, read_pairs
from qd2mora.errors import InputRefused
from qd2mora.recipe import Data, Task

CHOICES = ["red", "blue", "3"]
PROMPT = "Which?\nA. red\nB. blue\nC. 3\nAnswer: "


def read(folder: Path, rows: list[dict[str, object]], **changes: object) -> list[Pair]:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    task = Task(name="t", path=str(path), **changes)
    return read_pairs(task, task.path)


@pytest.mark.parametrize(
    ("choices", "answer", "letter"),
    [
        (CHOICES, 1, "B"),
        (CHOICES, "B", "B"),
        (CHOICES, " blue", "B"),
        (CHOICES, "2", "C"),
        (CHOICES, "3", "C"),  # a text before a number
        ({"text": CHOICES, "label": ["1", "2", "3"]}, "1", "A"),
        ({"text": CHOICES, "label": ["1", "2", "3"]}, "3", "C"),
    ],
)
def test_the_letter_of_the_right_choice_is_learned(
    choices: object, answer: object, letter: str, tmp_path: Path
) -> None:
    row = {"question": "Which?", "choices": choices, "answer": answer}
    assert read(tmp_path, [row], format="multiple_choice") == [Pair(PROMPT, letter, starts_word=True)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"answer": 3}, "outside the choices: 3 of A, B, C"),
        ({"answer": -1}, "outside the choices"),
        ({"answer": "D"}, "outside the choices: 'D'"),
        ({"answer": True}, "outside the choices"),
        ({"answer": None}, "outside the choices"),
        ({"choices": "red"}, "list of texts"),
        ({"choices": ["red", 3]}, "list of texts"),
        ({"choices": ["red", " "]}, "list of texts"),
        ({"choices": ["red", "b\0"]}, "NUL"),
        ({"choices": ["red"]}, "2 to 26"),
        ({"choices": ["same", "same"], "answer": "same"}, "outside the choices"),
        ({"question": 5}, "should be text"),
    ],
)
def test_a_label_outside_the_choices_is_a_bad_row(change: dict[str, object], words: str, tmp_path: Path) -> None:
    good = {"question": "Which?", "choices": CHOICES, "answer": 0}
    with pytest.raises(InputRefused, match=f"rows.jsonl, row 2: .*{words}"):
        read(tmp_path, [good, good | change], format="multiple_choice")


def test_fields_go_by_the_files_own_names(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"q": "red ", "a": "blue", "prompt": "not this"}]
    names = {"prompt": "q", "completion": "a"}
    assert read(tmp_path, rows, format="completion", fields=names) == [Pair("red ", "blue")]
    columns: list[dict[str, object]] = [{"question": "Which?", "a": "red", "b": "blue", "c": "3", "key": "B"}]
    names_of_choices: dict[str, object] = {"choices": ["a", "b", "c"], "answer": "key"}
    assert read(tmp_path, columns, format="multiple_choice", fields=names_of_choices) == [
        Pair(PROMPT, "B", starts_word=True)
    ]
    with pytest.raises(InputRefused, match="row 1: no field 'd'"):
        read(tmp_path, columns, format="multiple_choice", fields=names_of_choices | {"choices": ["a", "d"]})
    with pytest.raises(InputRefused, match="completion rows have no field 'output'; there are prompt"):
        read(tmp_path, rows, format="completion", fields={"output": "a"})
    with pytest.raises(InputRefused, match="row 1: field 'a' should be text"):
        read(tmp_path, [{"q": "red ", "a": 5}], format="completion", fields=names)


def test_arrow_files_of_both_forms_and_hub_data_sets_give_their_rows(tmp_path: Path) -> None:
    import datasets
    import pyarrow

    rows = [{"prompt": f"{number} ", "completion": "x"} for number in range(3000)]
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    with pyarrow.ipc.new_stream(tmp_path / "b.arrow", table.schema) as writer:
        writer.write_table(table)
    datasets.Dataset(table).to_parquet(tmp_path / "hub" / "train-00000-of-00001.parquet")
    wanted = [Pair(row["prompt"], "x") for row in rows]
    for path in (str(tmp_path / "a.arrow"), str(tmp_path / "b.arrow"), f"hub:{tmp_path / 'hub'}"):
        assert read_pairs(Task(name="t", path=path, format="completion"), path) == wanted
    task = Task(name="t", path=f"hub:{tmp_path / 'hub'}:train", format="completion", streaming=True, limit=5)
    assert read_pairs(task, task.path) == wanted[:5]
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.jsonl").write_text('{"prompt": "1", "completion": "x"}\n{"pro', encoding="utf-8")
    with pytest.raises(InputRefused, match="broken' cannot be got: JSON parse error"):
        read_pairs(task, f"hub:{tmp_path / 'broken'}")
    (tmp_path / "c.arrow").write_bytes(b"ARROW1 no")
    with pytest.raises(InputRefused, match=r"c\.arrow: not an arrow file"):
        read_pairs(task, str(tmp_path / "c.arrow"))


def test_the_example_rows_of_the_page_on_data_are_read(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    found = set()
    for section in page.split("\n## ")[1:]:
        name = section.split("\n", 1)[0]
        assert name in FORMATS
        rows = re.findall(r"```json\n(.*?)\n```", section, re.DOTALL)
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(rows), encoding="utf-8")
        template = "chatml" if name == "chat" else None
        task = Task(name="t", path=str(path), format=name, template=template)
        (made,) = prepare(Data(tasks=[task], max_length=1024), tokenizer, 0)
        assert rows and len(made.train) == len(rows)
        found.add(name)
    assert found == set(FORMATS)
