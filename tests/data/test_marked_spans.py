"""Spans of rows from the file to the batch: which tokens are marked, in both formats, cut, packed, and refused."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from qd2mora.data import Row, collate, prepare
from qd2mora.data.pack import MicroBatch, collate_packed
from qd2mora.data.spans import marks_of
from qd2mora.data.tokenise import Tokeniser
from qd2mora.errors import InputRefused
from qd2mora.recipe import Data, Task

NAMES = ["quote", "code"]
PROMPT, COMPLETION = "Say: red sun and blue moon", " red sun"


def made(folder: Path, rows: Sequence[dict[str, object]], **changes: object) -> Data:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    of_data = {key: changes.pop(key) for key in ("max_length", "on_bad_row") if key in changes}
    return Data(tasks=[Task(name="t", path=str(path), **({"format": "completion"} | changes))], spans=NAMES, **of_data)


def row_of(spans: object, **texts: str) -> dict[str, object]:
    return {"prompt": PROMPT, "completion": COMPLETION, "spans": spans} | texts


def span(
    start: int | None = None, end: int | None = None, adapter: object = "code", **place: object
) -> dict[str, object]:
    ends = {name: value for name, value in (("start", start), ("end", end)) if value is not None}
    return {"adapter": adapter, **(place or {"field": "prompt"}), **ends}


def marked(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, str]]:
    return [(mark, tokenizer.decode(row.ids[start:stop])) for mark, start, stop in row.marks or ()]


def test_letters_become_the_tokens_that_reach_into_them(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    spans = [span(17, 26), span(5, 8, "quote"), span(field="completion", adapter="quote")]
    (task,) = prepare(made(tmp_path, [row_of(spans), row_of(None)]), tokenizer, 0)
    first, second = task.train
    assert marked(first, tokenizer) == [(1, " red"), (2, " blue moon"), (1, " red sun")]
    assert second.marks == () and task.skipped.unread == {}
    assert task.skipped.remarks == {"have no token in a marked span: no adapter acts there": 1}
    batch = collate([first, second], tokenizer.pad_token_id)
    for mark, start, stop in first.marks or ():
        assert (batch["marks"][0, start:stop] == mark).all()
    assert int((batch["marks"] > 0).sum()) == sum(stop - start for _, start, stop in first.marks or ())
    assert batch["answer_mark"].tolist() == [1, 0]


def test_a_row_that_asks_keeps_the_marks_of_its_prompt_and_says_what_its_answer_is_under(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    (row,) = prepare(made(tmp_path, [row_of([span(5, 8, "quote"), span(field="completion")])]), tokenizer, 0)[0].train
    batch = collate([row.asked], tokenizer.pad_token_id, multiple=1, side="left")
    assert batch["input_ids"].shape[1] == row.masked and batch["answer_mark"].tolist() == [2]
    assert set(batch["marks"][0].tolist()) == {0, 1}
    other = row.with_answer(row.ids[:7])
    assert other.marks[-1] == (2, row.masked, row.masked + 7) and other.marks[:-1] == row.marks[:-1]


def test_a_token_in_two_spans_is_the_ones_it_begins_in_and_one_before_a_span_reaches_into_it() -> None:
    letters = [(0, 0), (0, 2), (2, 4), (4, 6), (6, 6), (6, 9), (9, 10)]
    assert marks_of(letters, [(1, 3, 5), (2, 5, 7)]) == ((1, 2, 4), (2, 5, 6))
    assert marks_of(letters, [(1, 0, 10)]) == ((1, 1, 4), (1, 5, 7))
    assert marks_of(letters, []) == ()


@pytest.mark.parametrize("text", [" a", "a b  c", "é日本 x", "\n\n", "x</s>y", ""])
def test_the_letters_of_tokens_are_found_whichever_way_they_were_made(
    text: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokeniser = Tokeniser(tokenizer)
    for ids in (
        *tokeniser.texts([text], special=True),
        *tokeniser.answers([text], starts_word=True),
        *tokeniser.answers([text], starts_word=False),
    ):
        letters = tokeniser.letters_of(text, ids)
        assert len(letters) == len(ids)
        for (start, stop), token in zip(letters, ids, strict=True):
            if stop - start > 0 and text[start:stop].isascii() and not tokenizer.decode([token]).isspace():
                assert tokenizer.decode([token]).strip() == text[start:stop].strip()


CHAT = [{"role": "user", "content": " red sun "}, {"role": "assistant", "content": "blue"}]
CHAT += [{"role": "user", "content": "red sun"}, {"role": "assistant", "content": "moon star"}]


@pytest.mark.parametrize("template", ["chatml", "plain"])
@pytest.mark.parametrize("system", [{}, {"system": "red"}])
def test_spans_of_messages_stand_where_the_template_words_them(
    template: str, system: dict[str, str], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    spans = [span(0, 5, "quote", message=0), span(4, 7, message=2), span(message=3, adapter="quote"), span(message=1)]
    rows = [{"messages": CHAT, "spans": spans, **system}]
    (row,) = prepare(made(tmp_path, rows, format="chat", template=template), tokenizer, 0)[0].train
    assert [(mark, text.strip()) for mark, text in marked(row, tokenizer)] == [
        *((1, "red"), (2, "blue"), (2, "sun"), (1, "moon star"))
    ]
    second = tokenizer.decode(row.ids[: row.marks[2][1]])
    assert second.count("red sun") == 1 and second.rstrip().endswith("red")  # the later of two like texts


def test_each_answer_of_a_conversation_has_the_spans_that_stand_before_it(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [{"messages": CHAT, "spans": [span(message=1), span(0, 3, "quote", message=2)]}]
    data = made(tmp_path, rows, format="chat", template="chatml", turns="each")
    one, two = prepare(data, tokenizer, 0)[0].train
    assert [text for _, text in marked(one, tokenizer)] == ["blue"]
    assert [(mark, text) for mark, text in marked(two, tokenizer)] == [(2, "blue"), (1, "red")]


def test_spans_that_are_cut_are_counted(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    long = "red sun " * 9
    rows = [
        row_of([span(0, 3), span(10, field="completion")], completion=long),
        row_of([span(0, 3)], completion=" red"),
    ]
    (task,) = prepare(made(tmp_path, rows, max_length=24), tokenizer, 0)
    assert task.skipped.remarks == {"lose a marked span, or its end, to data.max_length 24": 1}
    batch = collate(list(task.train), tokenizer.pad_token_id)
    assert batch["marks"].shape == batch["input_ids"].shape


def test_a_packed_line_has_the_marks_of_its_rows(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = [row_of([span(5, 8, "quote")]), row_of([span(17), span(field="completion", adapter="quote")]), row_of([])]
    found = list(prepare(made(tmp_path, rows), tokenizer, 0)[0].train)
    packed = collate_packed(MicroBatch(found, (0, 1, 2), (2, 1)), tokenizer.pad_token_id)
    padded = collate(found, tokenizer.pad_token_id)
    for number, row in enumerate(found):
        line = packed["marks"][packed["segments"] == number]
        assert torch.equal(line, padded["marks"][number, : len(row.ids)])
    assert not packed["marks"][packed["segments"] < 0].any()


BAD: list[tuple[object, str]] = [
    ([span(0, 99)], "a span lies outside of its text: 0 to 99 of 26 letters in prompt"),
    ([span(-1, 3)], "a span lies outside of its text: -1 to 3"),
    ([span(3, 3)], "a span lies outside of its text: 3 to 3"),
    ([span(0, 4), span(3, 6)], "two spans overlap: 0 to 4 and 3 to 6"),
    ([span(0, 4, "cod")], "a span names an unknown adapter: str 'cod'; data.spans has quote, code"),
    ([span(0, 4, ["code"])], "a span names an unknown adapter: list"),
    ([span(0, 4, field="output")], "a span's 'field' names no text of the row: str 'output'; prompt or completion"),
    ([span(0, 4, field=["prompt"])], "a span's 'field' names no text of the row: list"),
    ([span(0, 4) | {"start": 1.5}], "a span's ends should be whole numbers, they are float 1.5"),
    ([span(0, 4) | {"end": True}], "a span's ends should be whole numbers"),
    ([span(0, 4) | {"mode": 1}], "a span has a key that nothing reads: 'mode'"),
    ("[1]", "field 'spans' should be a list of objects"),
    ("{", "field 'spans':"),
    (7, "field 'spans' should be a list of objects, it is int 7"),
]


@pytest.mark.parametrize(("spans", "words"), BAD)
def test_spans_that_will_not_do_are_refused_by_their_row_or_left_out_and_counted(
    spans: object, words: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [row_of([span(0, 3)]), row_of(spans)]
    with pytest.raises(InputRefused) as refused:
        prepare(made(tmp_path, rows), tokenizer, 0)
    assert words in str(refused.value) and "rows.jsonl, row 2" in str(refused.value)
    (task,) = prepare(made(tmp_path, rows, on_bad_row="skip"), tokenizer, 0)
    assert len(task.train) == 1 and task.skipped.total == 1


@pytest.mark.parametrize(
    ("spans", "words"),
    [
        ([span(0, 1, message=9)], "a span's 'message' names no text of the row: int 9; a message's number from 0"),
        ([span(0, 1, message=True)], "a span's 'message' names no text"),
        ([span(0, 1)], "a span has a key that nothing reads: 'field'"),
        ([span(0, 1, message=0)], "a span marks white space alone"),
    ],
)
def test_spans_of_messages_that_will_not_do_are_refused(
    spans: object, words: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    with pytest.raises(InputRefused, match=words):
        prepare(made(tmp_path, [{"messages": CHAT, "spans": spans}], format="chat", template="plain"), tokenizer, 0)


def test_a_template_that_changes_what_a_span_marks_is_refused(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [{"messages": CHAT, "spans": [span(0, 3, message=2)]}]
    changes = {"m.content | replace('red sun', 'moon sun')": "otherwise where a span", "m.content * 2": "text twice"}
    for changed, words in changes.items():
        tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ " + changed + " }}</s>{% endfor %}"
        try:
            data = made(tmp_path, rows, format="chat")
            with pytest.raises(InputRefused, match=words):
                prepare(data, tokenizer, 0)
        finally:
            tokenizer.chat_template = None


def test_other_formats_have_no_spans(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = [{"instruction": "a", "output": "b"}]
    with pytest.raises(
        InputRefused, match="spans are read of completion and chat rows; those of task t are instruction"
    ):
        prepare(made(tmp_path, rows, format="instruction"), tokenizer, 0)
    with pytest.raises(ValueError, match="'a' is named twice"):
        Data(tasks=[Task(name="t", path="x")], spans=["a", "a"])
