"""Keys that no format reads: refused where they change what is learned, named elsewhere."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from qd2mora.data import prepare
from qd2mora.data.notes import notes
from qd2mora.errors import InputRefused
from qd2mora.recipe import Data, Task

TALK = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "sun"}]
ALPACA = {"instruction": "Say it.", "output": "sun"}
CALL = [{"type": "function", "function": {"name": "look"}}]


def task_of(folder: Path, row: dict[str, Any], **settings: Any) -> Task:
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(row), encoding="utf-8")
    if "messages" in row:
        settings = {"format": "chat", "template": "plain"} | settings
    return Task(name="t", path=str(path), **settings)


def said(task: Task, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return list(notes(prepare(Data(tasks=[task]), tokenizer, 0)[0], tokenizer))


@pytest.mark.parametrize(
    ("row", "key"),
    [
        ({"messages": [TALK[0] | {"tool_calls": CALL}, TALK[1]]}, "tool_calls"),
        ({"messages": [TALK[0] | {"tools": CALL}, TALK[1]]}, "tools"),
        ({"messages": [TALK[0], TALK[1] | {"train_detail": [{"begin_offset": 0}]}]}, "train_detail"),
        ({"messages": [TALK[0], TALK[1] | {"weight": 0.5}, *TALK]}, "weight"),
        ({"messages": [TALK[0], TALK[1] | {"train": "no"}]}, "train"),
        ({"messages": [TALK[0], TALK[1] | {"masked": []}]}, "masked"),
        ({"messages": TALK, "images": ["a.png"]}, "images"),
        ({"messages": TALK, "history": [["one", "two"]]}, "history"),
        (ALPACA | {"tools": CALL}, "tools"),
        (ALPACA | {"tools": json.dumps(CALL)}, "tools"),
        (ALPACA | {"history": [["one", "two"]]}, "history"),
        (ALPACA | {"train": False}, "train"),
        (ALPACA | {"system": "You count."}, "system"),
    ],
)
def test_a_key_that_changes_what_is_learned_is_refused_by_name(
    row: dict[str, Any], key: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    with pytest.raises(InputRefused, match=f"row 1: field '{key}' "):
        prepare(Data(tasks=[task_of(tmp_path, row)]), tokenizer, 0)


def test_keys_that_say_nothing_or_what_is_done_anyway_pass_unsaid(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    empty = {"tools": [], "history": "[]", "system": "", "images": None}
    turns = [TALK[0] | {"tool_calls": None}, TALK[1] | {"weight": 1, "train": True, "masked": False}]
    assert said(task_of(tmp_path, ALPACA | empty), tokenizer) == []
    assert said(task_of(tmp_path, {"messages": turns, **empty}), tokenizer) == []


def test_other_keys_are_named_with_their_rows_and_those_that_a_recipe_reads_are_not(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    row = ALPACA | {"answer": "sun", "kind": "x", "q": "Say it.", "weight": 70}
    task = task_of(tmp_path, row, select={"kind": "x"}, fields={"instruction": "q"})
    assert said(task, tokenizer) == [
        "fields that nothing reads: answer (1 rows), instruction (1 rows), weight (1 rows)"
    ]
    named = {"messages": [TALK[0] | {"name": "Ada"}, TALK[1]], "id": 7}
    assert said(task_of(tmp_path, named), tokenizer) == [
        "fields that nothing reads: id (1 rows), messages.name (1 rows)"
    ]


def test_a_rows_own_system_text_is_its_first_message(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be short."}

    def text(row: dict[str, Any], **settings: Any) -> str:
        (made,) = prepare(Data(tasks=[task_of(tmp_path, row, **settings)]), tokenizer, 0)[0].train
        return str(tokenizer.decode(made.ids))

    whole = text({"messages": [system, *TALK]})
    assert text({"messages": TALK, "system": "Be short."}) == whole
    assert text({"messages": [system, *TALK], "system": "Be short."}) == whole
    assert text({"messages": TALK, "sys": "Be short."}, fields={"system": "sys"}) == whole
    assert said(task_of(tmp_path, {"messages": TALK, "system": "x"}), tokenizer)[0].startswith(
        "1 rows bring their system"
    )
    with pytest.raises(InputRefused, match="two system messages, and they differ"):
        text({"messages": [system, *TALK], "system": "Be long."})
    assert "### System:\nBe short." in text(ALPACA | {"system": "Be short."}, template="plain")
