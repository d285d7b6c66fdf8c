"""Conversations as people have them: one meaning under every common spelling, and a line for what has none."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from qd2mora.base.passes import IGNORE
from qd2mora.data import TaskRows, collate, prepare
from qd2mora.data.conversation import FORMAT, Conversation, read_conversation
from qd2mora.data.file_rows import BadRow
from qd2mora.data.notes import notes
from qd2mora.errors import InputRefused
from qd2mora.recipe import Data, Task

ASKED, SAID = {"role": "user", "content": "red?"}, {"role": "assistant", "content": "sun"}
MORE, LAST = {"role": "user", "content": "blue?"}, {"role": "assistant", "content": "moon"}
TALK = [ASKED, SAID, MORE, LAST]
CALL = {"type": "function", "function": {"name": "look", "arguments": '{"star": "sun"}'}}


def read(messages: Any, **fields: Any) -> Conversation:
    return read_conversation({"messages": messages, **fields}, {})


def prepared(tokenizer: PreTrainedTokenizerBase, folder: Path, *rows: Any, **settings: Any) -> TaskRows:
    path = folder / "talks.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    how = {name: settings.pop(name) for name in ("on_bad_row", "mask_prompt") if name in settings}
    task = Task(name="t", path=str(path), **{"format": "chat", "template": "plain", **settings})
    return prepare(Data(tasks=[task], **how), tokenizer, 0)[0]


@pytest.mark.parametrize("place", ["messages", "conversations", "conversation"])
@pytest.mark.parametrize(("role", "content"), [("role", "content"), ("from", "value"), ("role", "value")])
@pytest.mark.parametrize(
    "names",
    [
        ("system", "user", "assistant", "tool"),
        ("system", "human", "gpt", "observation"),
        ("developer", "User", "bot", "function"),
    ],
)
def test_every_common_spelling_is_the_same_conversation_without_a_mapping(
    place: str, role: str, content: str, names: tuple[str, ...]
) -> None:
    result = {"role": "tool", "content": "sun seen"}
    talk = [
        {"role": "system", "content": "Be short."},
        ASKED,
        {"role": "assistant", "tool_calls": [CALL]},
        result,
        LAST,
    ]
    theirs = dict(zip(("system", "user", "assistant", "tool"), names, strict=True))
    respelled = []
    for turn in talk:
        said = {content: turn["content"]} if "content" in turn else {"tool_calls": [CALL]}
        respelled.append({role: theirs[str(turn["role"])], **said})
    row = {place: respelled}
    assert FORMAT.called("messages", row, {}) == place
    found = read(respelled)
    assert found == read(talk) and found.unread == found.remarks == ()


def test_calls_are_the_same_as_openai_and_sharegpt_write_them() -> None:
    arguments = {"star": "sun"}
    ways: list[dict[str, Any]] = [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": arguments}}]},
        {"role": "assistant", "tool_calls": json.dumps([{"name": "look", "arguments": arguments}])},
        {"role": "assistant", "content": None, "function_call": {"name": "look", "arguments": '{"star": "sun"}'}},
        {"from": "function_call", "value": json.dumps({"name": "look", "arguments": arguments})},
    ]
    for way in ways:
        (call,) = read([ASKED, way]).messages[1]["tool_calls"]
        found = call["function"]["arguments"]
        assert call["type"] == "function" and call["function"]["name"] == "look"
        assert (json.loads(found) if isinstance(found, str) else found) == arguments


def test_tools_may_be_objects_text_or_bare_functions() -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {}}}
    for tools in ([tool], json.dumps([tool]), [tool["function"]]):
        assert read(TALK, tools=tools).tools == (tool,)
    for nothing in (None, "", "[]", []):
        assert read(TALK, tools=nothing).tools == ()


def test_content_in_parts_is_their_texts_joined_and_a_conversation_may_be_text(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "red"}, {"type": "text", "text": "?"}]
    assert read([ASKED | {"content": parts}, SAID]).messages[0] == ASKED
    assert read(json.dumps(TALK)).messages == tuple(TALK)
    with pytest.raises(BadRow, match="a part of it is str 'image_url'"):
        read([ASKED | {"content": [{"type": "image_url", "image_url": {}}]}, SAID])


def test_a_csv_file_may_hold_conversations(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with (tmp_path / "talks.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["messages", "tools"], [json.dumps(TALK), ""]])
    task = Task(name="t", path=str(tmp_path / "talks.csv"), format="chat", template="plain")
    (row,) = prepare(Data(tasks=[task]), tokenizer, 0)[0].train
    assert row.ids.tolist() == prepared(tokenizer, tmp_path, {"messages": TALK}).train[0].ids.tolist()


SWITCHES: list[tuple[dict[str, Any], bool]] = [
    ({"weight": 0}, False),
    ({"weight": 0.0}, False),
    ({"weight": 1}, True),
    ({"train": False}, False),
    ({"training": False}, False),
    ({"train_on_turn": True}, True),
    ({"masked": True}, False),
    ({"mask": 0}, True),
    ({"weight": None}, True),
]


@pytest.mark.parametrize("which", [1, 3])
def test_a_message_that_is_switched_off_is_given_and_the_others_learned(
    which: int, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [
        {"messages": [turn | switch if number == which else turn for number, turn in enumerate(TALK)]}
        for switch, _ in SWITCHES
    ]
    made = prepared(tokenizer, tmp_path, *rows)
    for row, (_, is_learned) in zip(made.train, SWITCHES, strict=True):
        labels = collate([row], tokenizer.pad_token_id)["labels"][0]
        text = tokenizer.decode(labels[labels != IGNORE])
        assert text.count("</s>") == (2 if is_learned else 1)
        assert ("sun" in text) == (is_learned or which != 1) and ("moon" in text) == (is_learned or which != 3)
        if not is_learned:  # what follows the last answer that is learned is left out
            assert ("sun" in tokenizer.decode(row.ids)) and ("moon" in tokenizer.decode(row.ids)) == (which != 3)
    assert "5 rows have answers that a field leaves out of what is learned (weight: 0 and the like)" in notes(
        made, tokenizer
    )


def test_a_switch_and_learning_everything_are_refused_together(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    row = {"messages": [ASKED, SAID | {"weight": 0}, MORE, LAST]}
    with pytest.raises(InputRefused, match=r"data\.mask_prompt: false learns every message, and 1 rows of task t have"):
        prepared(tokenizer, tmp_path, row, mask_prompt=False)


def test_what_one_would_not_expect_of_a_conversation_is_said_with_its_count(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    talks: list[Any] = [
        TALK,
        [ASKED, ASKED, SAID],
        [ASKED, SAID, LAST],
        [ASKED | {"content": " "}, SAID],
        [ASKED, SAID, MORE],
        [ASKED | {"train": True}, SAID],
    ]
    assert list(notes(prepared(tokenizer, tmp_path, *({"messages": talk} for talk in talks)), tokenizer)) == [
        "2 rows have messages of one role in a row; they are worded as they are",
        "1 rows have an empty message of the user; it is worded as it is",
        "1 rows go on after the last answer that is learned; that is left out",
        "1 rows ask to learn messages of others; answers alone are learned",
    ]


def calling(**function: Any) -> list[Any]:
    return [ASKED, {"role": "assistant", "tool_calls": [{"function": function}]}]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": [{"role": "system", "content": "x"}]}, "an assistant's message is missing or empty"),
        ({"messages": [ASKED, SAID | {"content": ""}, *TALK]}, "an assistant's message is missing or empty"),
        ({"messages": [ASKED, SAID | {"weight": 0}]}, "no message is learned"),
        (
            {"messages": calling(name="look", arguments="{star")},
            "a tool call's arguments: not JSON: Expecting property",
        ),
        ({"messages": calling(name="look", arguments="[1]")}, "arguments should be an object, they are list"),
        ({"messages": calling(name="look", arguments='{"a": 1, "a": 2}')}, "a key is given twice: 'a'"),
        ({"messages": calling(arguments="{}")}, "a tool call names no function"),
        ({"messages": [ASKED, {"role": "assistant", "tool_calls": 5}]}, "should be a list of calls, it is int 5"),
        ({"messages": [ASKED, {"from": "function_call", "value": "look(sun)"}]}, "tool calls: not JSON"),
        ({"messages": TALK, "tools": "[{"}, "field 'tools': not JSON"),
        ({"messages": TALK, "tools": [{"type": "function"}]}, "should be a list of functions, one has no name"),
        ({"messages": TALK, "tools": {"name": "look"}}, "should be a list of functions, it is dict"),
        ({"messages": [{"role": "narrator", "content": "x"}, *TALK]}, "role should be one of system, user, assistant,"),
        ({"messages": [*TALK, {"role": "system", "content": "x"}]}, "system in the first alone; message 5 is system"),
        ({"messages": [{"role": "tool", "content": "x"}, *TALK]}, "tool after an answer alone; message 1 is tool"),
        ({"messages": [ASKED, SAID | {"reasoning_content": 5}]}, "field 'reasoning_content' should be text"),
        ({"messages": [ASKED, SAID | {"weight": 0.5}]}, "'weight' of a message should be 0 or 1, it is float 0.5"),
        ({"messages": [ASKED, SAID | {"train": "no"}]}, "'train' of a message should be 0 or 1, it is str 'no'"),
        ({"messages": "red"}, "'messages' should be a list of objects"),
    ],
)
def test_a_conversation_that_will_not_do_is_refused(row: dict[str, Any], words: str) -> None:
    with pytest.raises(BadRow) as refused:
        read(**row)
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_conversations_that_will_not_do_stop_the_run_by_their_row_or_are_left_out_and_counted_by_reason(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows: list[Any] = [{"messages": TALK}, {"messages": calling(name="look", arguments="{star")}, {"talk": TALK}]
    with pytest.raises(InputRefused, match=r"talks\.jsonl, row 2: a tool call's arguments: not JSON: Expecting"):
        prepared(tokenizer, tmp_path, *rows)
    with pytest.raises(InputRefused, match=r"row 2: no field 'messages'; the row has 'talk'"):
        prepared(tokenizer, tmp_path, rows[0], rows[2])
    made = prepared(tokenizer, tmp_path, *rows, on_bad_row="skip")
    assert made.skipped.counts == {"a tool call's arguments: not JSON": 1, "no field 'messages'": 1}
    assert len(made.train) == 1


def test_what_json_has_not_is_refused_wherever_it_stands(tmp_path: Path) -> None:
    deep: Any = "x"
    for _ in range(100):
        deep = [deep]
    for value, words in ((deep, "nested too deeply"), (float("nan"), "holds what JSON has not"), ("a\0", "NUL")):
        call = {"function": {"name": "look", "arguments": {"a": value}}}
        with pytest.raises(BadRow, match=words):
            read([ASKED, {"role": "assistant", "tool_calls": [call]}])
        with pytest.raises(BadRow, match=words):
            read(TALK, tools=[{"name": "look", "default": value}])


def test_templates_of_ours_word_tools_calls_results_and_reasoning(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    system = {"role": "system", "content": "Be short."}
    thought = {"role": "assistant", "reasoning_content": "hm", "content": "Wait.", "tool_calls": [CALL, CALL]}
    row = {"messages": [system, ASKED, thought, {"role": "tool", "content": "seen"}, LAST], "tools": [{"name": "look"}]}
    calls = '<tool_call>\n{"name": "look", "arguments": {"star": "sun"}}\n</tool_call>'
    said = f"<think>\nhm\n</think>\n\nWait.\n{calls}\n{calls}"
    for template, begin, end in (
        ("chatml", "<|im_start|>assistant\n", "<|im_end|>\n"),
        ("plain", "### Assistant:\n", "</s>\n\n"),
    ):
        (made,) = prepared(tokenizer, tmp_path, row, template=template).train
        text = str(tokenizer.decode(made.ids))
        assert f"{begin}{said}{end}" in text and text.endswith(f"{begin}moon{end}") and "seen" in text
        assert text.count("Be short.") == 1 and '{"type": "function", "function": {"name": "look"}}\n' in text
        labels = collate([made], tokenizer.pad_token_id)["labels"][0]
        assert tokenizer.decode(labels[labels != IGNORE]) == f"{said}{end}moon{end}"
