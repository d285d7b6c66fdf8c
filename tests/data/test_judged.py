"""Preferences and ratings, as texts and as chats; what of them cannot be compared is counted and named."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
from transformers import PreTrainedTokenizerBase

from qd2mora.base import load_tokenizer
from qd2mora.data import TaskRows, prepare
from qd2mora.data.first_rows import first_rows
from qd2mora.errors import InputRefused
from qd2mora.recipe import Data, Recipe, load_recipe, parse_recipe

TEXT = {"prompt": "Say red: ", "chosen": "red", "rejected": "blue"}
CHAT = {
    "prompt": [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": "say red"},
    ],
    "chosen": [{"role": "assistant", "content": "red"}],
    "rejected": [{"role": "assistant", "content": "blue moon"}],
}
RATED = {"prompt": "Say red: ", "answer": "red", "label": "good"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("judged")
    tiny.save_tokenizer(folder)
    return load_tokenizer(str(folder))


def data_of(folder: Path, rows: Sequence[Any], *, form: str = "preference", skip: bool = False, **task: Any) -> Data:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return Data.model_validate(
        {
            "tasks": [{"name": "pick", "path": str(path), "format": form, **task}],
            "max_length": 48 if not task.get("template") else 128,
            "on_bad_row": "skip" if skip else "error",
        }
    )


def prepared(data: Data, tokenizer: PreTrainedTokenizerBase) -> TaskRows:
    (task,) = prepare(data, tokenizer, 0)
    return task


def test_a_preference_is_one_row_of_two_lines_with_one_prompt(tmp_path: Path, tokenizer: Any) -> None:
    task = prepared(data_of(tmp_path, [TEXT, {**TEXT, "rejected": "green star", "margin": 0.5}]), tokenizer)
    assert len(task.train) == 2
    for row, rejected, margin in zip(task.train, ("blue", "green star"), (None, 0.5), strict=True):
        chosen, other = row.lines
        assert (chosen.ids[: chosen.masked] == other.ids[: other.masked]).all()
        assert [tokenizer.decode(line.ids[line.masked : -1]) for line in row.lines] == ["red", rejected]
        assert all(line.ids[-1] == tokenizer.eos_token_id for line in row.lines)
        assert row.num_tokens == len(chosen.ids) + len(other.ids) and row.pair.worth == margin
        assert task.lengths[0] == max(len(line.ids) for line in task.train[0].lines)


def test_answers_are_messages_with_or_without_the_prompts(tmp_path: Path, tokenizer: Any) -> None:
    whole = {**CHAT, "chosen": [*CHAT["prompt"], *CHAT["chosen"]]}
    said = {"prompt": "say red", "chosen": "red", "rejected": [{"role": "assistant", "content": "blue moon"}]}
    task = prepared(data_of(tmp_path, [CHAT, whole, said], template="plain"), tokenizer)
    rows = list(task.train)
    assert (rows[0].ids == rows[1].ids).all()
    for row in rows:
        texts = [tokenizer.decode(line.ids[line.masked :]) for line in row.lines]
        assert texts[0].startswith("red") and texts[1].startswith("blue moon")
        assert all(line.earlier == () for line in row.lines)  # the assistant's first word is not learned


def test_a_rating_is_good_or_bad(tmp_path: Path, tokenizer: Any) -> None:
    labels = ["good", "bad", True, False, 1, 0, "True"]
    task = prepared(data_of(tmp_path, [{**RATED, "label": label} for label in labels], form="rated"), tokenizer)
    assert [row.pair.worth for row in task.train] == [1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0]
    assert all(row.lines == (row,) for row in task.train)


LONG = {**TEXT, "rejected": "one two three " * 30}
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("preference", {**TEXT, "rejected": " red"}, "chosen and rejected are equal"),
    ("preference", {**TEXT, "chosen": ""}, "field 'chosen' is empty"),
    ("preference", {**TEXT, "prompt": " "}, "field 'prompt' is empty"),
    ("preference", {"chosen": "red", "rejected": "blue"}, "no field 'prompt'"),
    ("preference", CHAT, "field 'prompt' holds messages"),
    ("preference", {**TEXT, "chosen": 3}, "field 'chosen' should be text"),
    ("preference", {**TEXT, "margin": "much"}, "field 'margin' should be a number"),
    ("preference", LONG, "longer than data.max_length 48"),
    ("rated", {**RATED, "label": "fair"}, "field 'label' should be good or bad"),
    ("rated", {**RATED, "answer": "  "}, "field 'answer' is empty"),
    ("rated", {**RATED, "answer": "one two three " * 30}, "longer than data.max_length 48"),
]


@pytest.mark.parametrize(("form", "bad", "reason"), BAD)
def test_what_cannot_be_compared_stops_the_run_by_name_or_is_counted(
    form: str, bad: dict[str, Any], reason: str, tmp_path: Path, tokenizer: Any
) -> None:
    good = [TEXT, TEXT] if form == "preference" else [RATED, {**RATED, "label": "bad"}]
    rows = [*good, bad]
    with pytest.raises(InputRefused, match=reason.replace("(", r"\(")) as refused:
        prepared(data_of(tmp_path, rows, form=form), tokenizer)
    assert "row" in str(refused.value) and "3" in str(refused.value)
    task = prepared(data_of(tmp_path, rows, form=form, skip=True), tokenizer)
    assert len(task.train) == 2
    (found,) = task.skipped.places.items()
    assert found[0].startswith(reason[:20]) and len(found[1]) == 1 and "3" in found[1][0]


def test_a_chat_whose_answer_is_not_one_message_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    for answer in ([*CHAT["chosen"], *CHAT["chosen"]], CHAT["prompt"], [{"role": "user", "content": "red"}]):
        with pytest.raises(InputRefused, match="field 'chosen' should be"):
            prepared(data_of(tmp_path, [{**CHAT, "chosen": answer}], template="plain"), tokenizer)


def test_ratings_of_one_kind_are_refused_or_said(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(InputRefused, match="all 2 rows are rated good, none bad"):
        prepared(data_of(tmp_path, [RATED, RATED], form="rated"), tokenizer)
    assert len(prepared(data_of(tmp_path, [RATED, RATED], form="rated", skip=True), tokenizer).train) == 2
    assert "all 2 rows are rated good" in caplog.text


def test_both_lines_are_held_out_together_and_said_twice_counts_once(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{**TEXT, "chosen": f"red {word}"} for word in tiny.WORDS] + [{**TEXT, "chosen": "no word"}]
    task = prepared(data_of(tmp_path, [*rows, rows[0]], validation=4), tokenizer)
    texts = {"".join(tokenizer.decode(line.ids) for line in row.lines) for row in task.train}
    held = {"".join(tokenizer.decode(line.ids) for line in row.lines) for row in task.validation}
    assert len(task.validation) == 4 and len(task.train) == 10 and len(texts - held) >= 8
    assert task.skipped.duplicates == 1
    assert all(row.lines[1].pair.answer == "blue" for row in (*task.train, *task.validation))


def test_the_first_rows_are_pairs_too(tmp_path: Path, tokenizer: Any) -> None:
    (found,) = first_rows(data_of(tmp_path, [TEXT, {**TEXT, "rejected": "moon"}]), tokenizer)
    assert found.is_all and [len(row.lines) for row in found.rows] == [2, 2]


def recipe_of(tmp_path: Path, **changes: Any) -> Recipe:
    content: dict[str, Any] = {
        "base": {"model": "random:tiny"},
        "data": {"tasks": [{"name": "pick", "path": "rows.jsonl", "format": "preference"}]},
        "objective": "dpo",
        "train": {"steps": 1},
        "output": str(tmp_path / "run"),
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            content[section] = {**content.get(section, {}), name: value}
        else:
            content[section] = value
    return parse_recipe(content)


def test_a_name_stands_for_a_section_with_its_defaults(tmp_path: Path) -> None:
    assert recipe_of(tmp_path).objective == recipe_of(tmp_path, objective={"kind": "dpo", "beta": 0.1}).objective
    assert recipe_of(tmp_path).objective.beta == 0.1 and recipe_of(tmp_path).objective.gamma is None
    again = recipe_of(tmp_path, objective=recipe_of(tmp_path).objective.model_dump(mode="json"))
    assert again.objective == recipe_of(tmp_path).objective


def test_a_setting_may_follow_a_name_on_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_of(tmp_path, objective="simpo").dump_yaml(), encoding="utf-8")
    found = load_recipe(path, ["objective=dpo", "objective.beta=0.2"])
    assert found.objective.kind == "dpo" and found.objective.beta == 0.2


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"objective": "pdo"}, "objective.kind: 'pdo' will not do"),
        ({"objective": {"kind": "orpo", "gamma": 1.0}}, "objective: gamma is no setting of orpo; it has beta"),
        ({"objective": {"kind": "dpo", "betta": 1.0}}, "unknown key objective.betta; did you mean objective.beta"),
        ({"objective": {"kind": "dpo", "loss": "ipo", "label_smoothing": 0.1}}, "label_smoothing is of loss: sigmoid"),
        ({"objective": "kto"}, "kto learns from format: rated; task 'pick' is preference"),
        ({"objective": "sft"}, "preference rows are for objective: dpo, orpo, simpo"),
        ({"data__packing": True}, "data.packing: dpo judges answers as a whole"),
        ({"data__mask_prompt": False}, "data.mask_prompt: dpo judges answers"),
    ],
)
def test_a_recipe_that_does_not_fit_its_objective_is_refused_by_name(
    changes: dict[str, Any], line: str, tmp_path: Path
) -> None:
    with pytest.raises(InputRefused, match=line.replace("(", r"\(")):
        recipe_of(tmp_path, **changes)


def test_a_recipe_of_answers_says_nothing_of_an_objective(tmp_path: Path) -> None:
    plain = recipe_of(tmp_path, objective="sft", data={"tasks": [{"name": "a", "path": "rows.jsonl"}]})
    assert "objective" not in plain.dump_yaml() and "objective" not in plain.deciding()
    assert recipe_of(tmp_path).deciding()["objective"]["kind"] == "dpo"
