"""Masks under templates as families have them: the template's own tokens, learned where an answer is written."""

import json
from pathlib import Path
from typing import Any

import chat_templates
import pytest
import tiny
from transformers import PreTrainedTokenizerBase

from qd2mora.base import load_tokenizer
from qd2mora.base.passes import IGNORE
from qd2mora.data import Row, TaskRows, collate, prepare
from qd2mora.data.notes import notes
from qd2mora.errors import InputRefused
from qd2mora.recipe import Data, Task

USER, ANSWER = {"role": "user", "content": "red sun?"}, {"role": "assistant", "content": "blue moon"}
MORE, LAST = {"role": "user", "content": " two cats\n"}, {"role": "assistant", "content": "three birds"}
SYSTEM = {"role": "system", "content": "Be short."}
TALK = [USER, ANSWER, MORE, LAST]
TOOL = {
    "type": "function",
    "function": {"name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {}}},
}
CALL = {"id": "abcdef123", "type": "function", "function": {"name": "look", "arguments": {"star": "sun", "n": [1, 2]}}}
CALLED = {"role": "assistant", "tool_calls": [CALL]}
RESULT = {"role": "tool", "name": "look", "tool_call_id": "abcdef123", "content": '{"seen": "moon"}'}
WITH_CALL = [USER, CALLED, RESULT, LAST]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    tiny.save_tokenizer(folder)
    tokenizer = load_tokenizer(str(folder))
    tokenizer.add_special_tokens({"additional_special_tokens": list(chat_templates.TOKENS)})
    return tokenizer


def rows_of(tokenizer: PreTrainedTokenizerBase, template: str, folder: Path, *talks: Any, **settings: Any) -> TaskRows:
    """Prepare conversations: each a list of messages or a whole row."""
    path = folder / "talks.jsonl"
    rows = [talk if isinstance(talk, dict) else {"messages": talk} for talk in talks]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    tokenizer.chat_template = template
    return prepare(Data(tasks=[Task(name="t", path=str(path), format="chat", **settings)]), tokenizer, 0)[0]


def learned(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the stretches of a row that are learned, as text."""
    labels = collate([row], tokenizer.pad_token_id)["labels"][0].tolist()
    found: list[list[int]] = []
    for place, label in enumerate(labels):
        if label == IGNORE:
            continue
        assert label == row.ids[place]
        if not place or labels[place - 1] == IGNORE:
            found.append([])
        found[-1].append(label)
    return [str(tokenizer.decode(ids)) for ids in found]


WHOLE = [
    ("LLAMA3", [SYSTEM, *TALK], ["blue moon<|eot_id|>", "three birds<|eot_id|>"]),
    ("MISTRAL", [SYSTEM, *TALK], [" blue moon</s>", " three birds</s>"]),
    ("QWEN25", TALK, ["blue moon<|im_end|>\n", "three birds<|im_end|>\n"]),
    ("GEMMA", TALK, ["blue moon<end_of_turn>\n", "three birds<end_of_turn>\n"]),
    ("PHI3", [SYSTEM, *TALK], ["blue moon<|end|>\n", "three birds<|end|>\n</s>"]),
    ("ZEPHYR", [SYSTEM, *TALK], ["blue moon</s>\n", "three birds</s>\n"]),
    ("CHATML", [SYSTEM, *TALK], ["blue moon<|im_end|>\n", "three birds<|im_end|>\n"]),
    ("SMOLLM2", TALK, ["blue moon<|im_end|>\n", "three birds<|im_end|>\n"]),
    ("GRANITE", [SYSTEM, *TALK], ["blue moon<|end_of_text|>\n", "three birds<|end_of_text|>\n"]),
    ("DEEPSEEK", [SYSTEM, *TALK], ["blue moon</s>", "three birds</s>"]),
    ("LLAMA2", [SYSTEM, *TALK], [" blue moon </s>", " three birds </s>"]),
    ("QWEN3", [SYSTEM, USER, LAST], ["<think>\n\n</think>\n\nthree birds<|im_end|>\n"]),
    ("CHATML", [ANSWER, USER, LAST], ["blue moon<|im_end|>\n", "three birds<|im_end|>\n"]),
    ("LLAMA3", [USER, ANSWER, LAST], ["blue moon<|eot_id|>", "three birds<|eot_id|>"]),
    (
        "LLAMA3",
        WITH_CALL,
        ['{"name": "look", "parameters": {"star": "sun", "n": [1, 2]}}<|eot_id|>', "three birds<|eot_id|>"],
    ),
    (
        "MISTRAL",
        WITH_CALL,
        [
            '[TOOL_CALLS] [{"name": "look", "arguments": {"star": "sun", "n": [1, 2]}, "id": "abcdef123"}]</s>',
            " three birds</s>",
        ],
    ),
    (
        "QWEN25",
        WITH_CALL,
        [
            '<tool_call>\n{"name": "look", "arguments": {"star": "sun", "n": [1, 2]}}\n</tool_call><|im_end|>\n',
            "three birds<|im_end|>\n",
        ],
    ),
    (
        "GRANITE",
        [USER, {**CALLED, "content": ""}, RESULT, LAST],
        [
            '<tool_call>[{"name": "look", "arguments": {"star": "sun", "n": [1, 2]}}]<|end_of_text|>\n',
            "three birds<|end_of_text|>\n",
        ],
    ),
]


@pytest.mark.parametrize("name", dict.fromkeys(name for name, _, _ in WHOLE))
def test_rows_are_the_templates_own_tokens_and_answers_alone_are_learned(
    name: str, plain: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    cases = [(talk, wanted) for other, talk, wanted in WHOLE if other == name]
    made = rows_of(plain, getattr(chat_templates, name), tmp_path, *(talk for talk, _ in cases)).train
    for row, (talk, wanted) in zip(made, cases, strict=True):
        assert row.ids.tolist() == plain.apply_chat_template(talk)["input_ids"]
        assert learned(row, plain) == wanted


def test_tools_are_given_to_the_template_and_are_not_learned(plain: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    for name in ("LLAMA3", "QWEN25", "MISTRAL"):
        given = ([TOOL], json.dumps([TOOL]), [TOOL["function"]])
        rows = [{"messages": [USER, ANSWER], "tools": tools} for tools in given]
        for made in rows_of(plain, getattr(chat_templates, name), tmp_path, *rows).train:
            assert made.ids.tolist() == plain.apply_chat_template([USER, ANSWER], tools=[TOOL])["input_ids"]
            (answer,) = learned(made, plain)
            assert answer.strip().startswith("blue moon")


def test_arguments_are_worded_from_text_and_from_objects_as_each_template_takes_them(
    plain: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    def call(arguments: object) -> dict[str, Any]:
        return {"role": "assistant", "tool_calls": [CALL | {"function": {"name": "look", "arguments": arguments}}]}

    as_object, as_text = call({"star": "sun"}), call('{"star": "sun"}')
    for name, native in (("QWEN25", as_object), ("LLAMA3", as_object), ("DEEPSEEK", as_text), ("QWEN3", as_text)):
        wanted = plain.apply_chat_template([USER, native], chat_template=getattr(chat_templates, name))["input_ids"]
        rows = rows_of(plain, getattr(chat_templates, name), tmp_path, [USER, as_object], [USER, as_text]).train
        assert [row.ids.tolist() for row in rows] == [wanted, wanted]
    (row,) = rows_of(plain, chat_templates.DEEPSEEK, tmp_path, [USER, as_object, RESULT, LAST]).train
    assert learned(row, plain) == [
        '<|calls|><|call|>function<|sep|>look\n```json\n{"star": "sun"}\n```<|endcalls|></s>',
        "three birds</s>",
    ]


def test_a_template_that_rewrites_earlier_turns_gives_a_row_for_each_answer_worded_as_it_is_asked_for(
    plain: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    talk = [USER, ANSWER | {"reasoning_content": "one cat"}, MORE, LAST | {"reasoning_content": "two dogs"}]
    made = rows_of(plain, chat_templates.QWEN3, tmp_path, talk)
    first, second = made.train
    assert first.ids.tolist() == plain.apply_chat_template(talk[:2])["input_ids"]
    assert second.ids.tolist() == plain.apply_chat_template(talk)["input_ids"]
    assert learned(first, plain) == ["<think>\none cat\n</think>\n\nblue moon<|im_end|>\n"]
    assert learned(second, plain) == ["<think>\ntwo dogs\n</think>\n\nthree birds<|im_end|>\n"]
    assert "one cat" not in plain.decode(second.ids)
    assert "1 rows become a row for each answer, as the chat template rewrites earlier turns" in notes(made, plain)


def test_answers_stay_together_as_far_as_the_template_leaves_them_alone(
    plain: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """A call, its result and the answer think in one turn; the next question makes the template forget it."""
    thought = {"reasoning_content": "one cat"}
    talk = [USER, CALLED | thought, RESULT, ANSWER | thought, MORE, LAST | thought]
    first, second = rows_of(plain, chat_templates.QWEN3, tmp_path, talk).train
    assert first.ids.tolist() == plain.apply_chat_template(talk[:4])["input_ids"]
    assert [part[:8] for part in learned(first, plain)] == ["<think>\n", "<think>\n"]
    assert second.ids.tolist() == plain.apply_chat_template(talk)["input_ids"]
    assert learned(second, plain) == ["<think>\none cat\n</think>\n\nthree birds<|im_end|>\n"]


@pytest.mark.parametrize(
    ("name", "turns", "wanted"),
    [
        ("CHATML", "together", [["blue moon<|im_end|>\n", "three birds<|im_end|>\n"]]),
        ("CHATML", "each", [["blue moon<|im_end|>\n"], ["three birds<|im_end|>\n"]]),
        ("CHATML", "last", [["three birds<|im_end|>\n"]]),
        ("QWEN3", "last", [["<think>\n\n</think>\n\nthree birds<|im_end|>\n"]]),
    ],
)
def test_a_task_says_how_answers_share_rows(
    name: str, turns: str, wanted: list[list[str]], plain: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    made = rows_of(plain, getattr(chat_templates, name), tmp_path, TALK, turns=turns)
    assert [learned(row, plain) for row in made.train] == wanted
    assert made.train[-1].ids.tolist() == plain.apply_chat_template(TALK)["input_ids"]


def test_together_is_refused_where_the_template_rewrites_and_turns_is_for_chats(
    plain: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    with pytest.raises(InputRefused, match=r"row 1: the chat template rewrites earlier turns; leave turns out, or"):
        rows_of(plain, chat_templates.QWEN3, tmp_path, TALK, turns="together")
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "b"}', encoding="utf-8")
    task = Task(name="t", path=str(tmp_path / "a.jsonl"), format="completion", turns="each")
    with pytest.raises(InputRefused, match=r"data\.tasks\.t\.turns: each is for chats"):
        prepare(Data(tasks=[task]), plain, 0)


def test_rows_of_one_conversation_are_held_out_together(plain: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    talks = [[{**turn, "content": f"{turn['content']} {number}"} for turn in TALK] for number in range(9)]
    made = rows_of(plain, chat_templates.QWEN3, tmp_path, *talks, validation=3)
    held = {row.pair.answer.split()[-1] for row in made.validation}
    assert len(made.validation) == 6 and len(held) == 3 and len(made.train) == 12
    assert not held & {row.pair.answer.split()[-1] for row in made.train}


@pytest.mark.parametrize("name", ["MARKED", "MARKED_INSIDE"])
def test_marks_of_a_template_are_learned_as_transformers_counts_them(
    name: str, plain: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    template = getattr(chat_templates, name)
    (row,) = rows_of(plain, template, tmp_path, [SYSTEM, *TALK]).train
    wanted = plain.apply_chat_template([SYSTEM, *TALK], return_assistant_tokens_mask=True)
    stop = max(place for place, flag in enumerate(wanted["assistant_masks"]) if flag) + 1
    assert row.ids.tolist() == wanted["input_ids"][:stop]  # what follows the last mark is given, and left out
    labels = collate([row], plain.pad_token_id, multiple=1)["labels"][0].tolist()
    assert [int(label != IGNORE) for label in labels] == wanted["assistant_masks"][:stop]
    switched = [SYSTEM, USER, ANSWER | {"weight": 0}, MORE, LAST]
    (row,) = rows_of(plain, template, tmp_path, switched).train
    assert len(learned(row, plain)) == 1 and "birds" in learned(row, plain)[0]


def test_marks_of_a_template_that_rewrites_count_in_each_answers_own_row_or_all_together_where_asked(
    plain: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ ('<think>' if loop.last else '') + m.content + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    made = rows_of(plain, template, tmp_path, TALK).train
    assert [learned(row, plain) for row in made] == [["<think>blue moon<|im_end|>"], ["<think>three birds<|im_end|>"]]
    (row,) = rows_of(plain, template, tmp_path, TALK, turns="together").train
    assert learned(row, plain) == ["blue moon<|im_end|>", "<think>three birds<|im_end|>"]


@pytest.mark.parametrize(
    ("name", "talk", "words"),
    [
        ("GEMMA", [SYSTEM, *TALK], "the chat template refuses it: System role not supported"),
        ("GEMMA", [USER, USER, ANSWER], "refuses it: Conversation roles must alternate user/assistant"),
        ("MISTRAL", [ANSWER, USER, LAST], "refuses it: roles must alternate user/assistant"),
        ("MISTRAL", [USER, {"role": "assistant", "tool_calls": [{**CALL, "id": "x"}]}], "IDs should be 9 letters long"),
        ("LLAMA3", [USER, {"role": "assistant", "tool_calls": [CALL, CALL]}], "only supports single tool-calls"),
        ("CHATML", {"messages": TALK, "tools": [TOOL]}, "field 'tools' is left out by the chat template"),
        ("SMOLLM2", WITH_CALL, "tool calls are left out by the chat template"),
        ("ZEPHYR", [USER, ANSWER, {"role": "tool", "content": "stars"}, LAST], "a message of the tool is left out"),
        ("ANSWERED_OTHERWISE", TALK, "words a question otherwise once it is answered; name template: chatml"),
    ],
)
def test_what_a_template_refuses_or_leaves_out_is_said_in_one_line(
    name: str, talk: Any, words: str, plain: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    with pytest.raises(InputRefused) as refused:
        rows_of(plain, getattr(chat_templates, name), tmp_path, talk)
    assert "talks.jsonl, row 1: " in str(refused.value) and words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_answer_that_is_shortened_and_reasoning_that_is_left_out_are_counted(
    plain: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    thinking = LAST | {"content": "<think>one cat</think>three birds"}
    made = rows_of(plain, chat_templates.DEEPSEEK, tmp_path, [USER, thinking], [USER, LAST | {"thinking": "two cats"}])
    said = list(notes(made, plain))
    assert "1 rows have answers of which the chat template leaves out a part" in said
    assert "1 rows bring reasoning that the chat template leaves out" in said
    beside = rows_of(plain, chat_templates.LLAMA3, tmp_path, [USER, CALLED | {"content": "Let me see."}, RESULT, LAST])
    assert "1 rows have answers of which the chat template leaves out a part" in notes(beside, plain)


def test_an_exact_score_compares_with_what_the_template_words(plain: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    def right(name: str, talk: Any) -> str:
        return rows_of(plain, getattr(chat_templates, name), tmp_path, talk).train[-1].pair.answer

    assert right("CHATML", TALK) == right("PHI3", TALK) == right("MISTRAL", TALK) == "three birds"
    assert right("QWEN3", TALK) == "<think>\n\n</think>\n\nthree birds"
    assert right("QWEN25", [USER, CALLED]).endswith("</tool_call>")
