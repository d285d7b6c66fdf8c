"""The preview: every token in its colour, every loss with its count."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from qd2mora.base import load_tokenizer
from qd2mora.data import Pair, Row, prepare
from qd2mora.recipe import Data, Task, load_recipe
from qd2mora.report import show_rows
from qd2mora.report.preview import bars, coloured, problems


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    tiny.save_tokenizer(folder)
    return load_tokenizer(str(folder))


def test_every_token_is_shown_in_the_colour_of_what_is_done_with_it(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer("red sun</s>moon")["input_ids"] + [tokenizer.eos_token_id]
    row = Row(0, np.array(ids, dtype=np.int32), len(ids) - 2, Pair("", ""), earlier=((2, 3),))
    text = coloured(row, tokenizer)
    assert text.plain == tokenizer.decode(ids)
    shown = [(text.plain[span.start : span.end], str(span.style)) for span in text.spans]
    assert shown[0] == ("<s>", "dim reverse")
    assert ("</s>", "dim reverse") in shown and shown[-1] == ("</s>", "green reverse")
    learned = "".join(part for part, style in shown if "green" in style)
    assert learned == tokenizer.decode(ids[2:3]) + tokenizer.decode(ids[-2:])


def test_what_is_lost_doubled_or_open_is_counted(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = [{"prompt": "red ", "completion": "sun"}] * 3 + [{"prompt": "red " * 60, "completion": "x"}]
    rows += [{"prompt": "red ", "completion": "moon " * 60}, {"prompt": "red "}, {"prompt": "a", "completion": 5}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    data = Data(
        tasks=[Task(name="t", path=str(path), format="completion")], max_length=32, on_bad_row="skip", mask_prompt=True
    )
    (task,) = prepare(data, tokenizer, 0)
    assert list(problems(task, tokenizer, 32)) == [
        f"1 rows left out: no field 'completion' ({path}, row 6)",
        f"1 rows left out: field 'completion' should be text ({path}, row 7)",
        "1 rows dropped: data.max_length 32 leaves no room for an answer",
        "1 rows lose the end of the answer to data.max_length 32",
        "2 rows say what an earlier row says",
    ]
    task.train = [Row(0, np.array([1, 5, 6], dtype=np.int32), 1, Pair("", ""))] * 2
    assert "2 whole rows never learn the end token </s>" in list(problems(task, tokenizer, 32))[-1]


def test_a_template_that_closes_turns_with_plain_text_is_named_with_what_would_do(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = tmp_path / "talks.jsonl"
    talk = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "sun"}]
    path.write_text(json.dumps({"messages": talk}), encoding="utf-8")

    def said(template: str) -> list[str]:
        tasks = [Task(name="t", path=str(path), format="chat", template=template)]
        return list(problems(prepare(Data(tasks=tasks), tokenizer, 0)[0], tokenizer, 512))

    (line,) = said("chatml")
    assert line.startswith("1 whole rows never learn the end token </s>") and "template chatml closes a turn" in line
    assert line.endswith("template: plain closes it with the end token")
    assert said("plain") == []


def test_a_histogram_has_its_bars_where_the_lengths_are() -> None:
    line = bars(np.array([0, 0, 0, 0, 63, 63], dtype=np.int32), 63)
    assert (line[0], line[-1], set(line[1:-1])) == ("█", "▄", {" "})


def test_the_preview_shows_rows_lengths_and_shares(tmp_path: Path) -> None:
    tiny.save_base(tmp_path / "base")
    tiny.save_tasks(tmp_path / "data")
    path = tmp_path / "recipe.yaml"
    path.write_text(tiny.recipe_text(tmp_path / "base", tmp_path / "data", tmp_path / "run"), encoding="utf-8")
    weights = ("data.tasks.0.weight=1", "data.tasks.1.weight=3", "data.mix=tokens", "data.max_length=256")
    console = Console(width=160, record=True)
    show_rows(load_recipe(path, weights), 1, console)
    text = console.export_text()
    assert "### Response:" in text and "</s>" in text and "0 to 256" in text
    assert "25.0% of tokens" in text and "75.0% of tokens" in text
    assert "say what an earlier row says" in text


def test_each_part_of_a_conversation_has_its_colour_dim_where_it_is_given_and_none_when_piped(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    call = {"function": {"name": "look", "arguments": {"star": "red"}}}
    talk = [
        {"role": "system", "content": "short words"},
        {"role": "user", "content": "which star?"},
        {"role": "assistant", "reasoning": "I see none", "tool_calls": [call]},
        {"role": "tool", "content": "star found"},
        {"role": "assistant", "reasoning": "so it is", "content": "the red one"},
        {"role": "user", "content": "and now?"},
        {"role": "assistant", "content": "blue moon", "weight": 0},
        {"role": "user", "content": "thanks"},
        {"role": "assistant", "content": "no cause"},
    ]
    path = tmp_path / "talks.jsonl"
    path.write_text(json.dumps({"messages": talk, "tools": [call["function"]]}), encoding="utf-8")
    task = Task(name="t", path=str(path), format="chat", template="plain")
    text = coloured(prepare(Data(tasks=[task]), tokenizer, 0)[0].train[0], tokenizer)

    def style_of(words: str) -> str:
        place = text.plain.rindex(words)
        (span,) = (span for span in text.spans if span.start <= place < span.end)
        assert span.end >= place + len(words)
        return str(span.style)

    styles = {
        "### User:": "dim cyan",
        "short words": "dim",
        "which star?": "dim",
        "I see none": "magenta",
        "look": "yellow",
        '{"star": "red"}': "yellow",
        "star found": "dim yellow",
        "so it is": "magenta",
        "the red one": "green",
        "blue moon": "dim",
        "no cause": "green",
    }
    assert {words: style_of(words) for words in styles} == styles
    assert str(text.spans[-1].style) in ("green", "green reverse")
    tools = text.plain[: text.plain.index("### System:")]
    before = [span for span in text.spans if span.end <= len(tools)]
    assert {str(span.style) for span in before if "look" in tools[span.start : span.end]} == {"dim yellow"}
    piped = io.StringIO()
    Console(file=piped, width=100).print(text)
    assert "which star?" in piped.getvalue() and "\x1b" not in piped.getvalue()
