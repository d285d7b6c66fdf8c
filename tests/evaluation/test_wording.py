"""How messages are worded: as the named task was trained, said in one line, carried by exports."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qd2mora.base import load_tokenizer
from qd2mora.cli import main
from qd2mora.data import prepare
from qd2mora.data.chat import TEMPLATES, template_to_keep
from qd2mora.data.instruction import split
from qd2mora.errors import InputRefused
from qd2mora.evaluation import Subject, TalkOptions, generate
from qd2mora.evaluation.wording import wording_of
from qd2mora.merging import ExportOptions, merge
from qd2mora.recipe import Data, Task, load_recipe
from qd2mora.run_folder import RunFolder, read_recipe
from qd2mora.training import train

OWN = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}\n{% endfor %}"
OWN += "{% if add_generation_prompt %}[assistant] {% endif %}"
TALK = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "sun"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one instruction task and one of conversations in chatml, and its export."""
    folder = tmp_path_factory.mktemp("worded")
    tiny.save_base(folder / "base", tied=False)
    tiny.save_tasks(folder / "data")
    (folder / "talks.jsonl").write_text("\n".join([json.dumps({"messages": TALK})] * 20), encoding="utf-8")
    path = folder / "recipe.yaml"
    path.write_text(tiny.recipe_text(folder / "base", folder / "data", folder / "run", method="lora"), encoding="utf-8")
    changes = {"path": folder / "talks.jsonl", "format": "chat", "template": "chatml"}
    train(load_recipe(path, ["train.steps=2", *(f"data.tasks.1.{key}={value}" for key, value in changes.items())]))
    merge(folder / "run", folder / "hf", ExportOptions(measured_rows=0))
    return folder


@pytest.fixture
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(folder / "base"))


def subject_of(tokenizer: PreTrainedTokenizerBase, *tasks: Task) -> Subject:
    if not tasks:
        return Subject(None, tokenizer)
    run: Any = SimpleNamespace(recipe=SimpleNamespace(data=Data(tasks=list(tasks))))
    return Subject(None, tokenizer, run)


def test_a_prompt_is_worded_as_its_task_was_trained_and_not_as_another(tokenizer: PreTrainedTokenizerBase) -> None:
    facts = Task(name="facts", path="x")
    talks = Task(name="talks", path="x", format="chat", template="plain")
    parts = Task(name="parts", path="x", format="completion")
    subject = subject_of(tokenizer, facts, talks, parts)

    def name(task: str | None, *, is_conversation: bool = False) -> str:
        return wording_of(subject, None, task, is_conversation=is_conversation).name

    assert [name("facts"), name("talks"), name("parts")] == ["instruction", "plain", "as it is"]
    assert name(None) == "instruction" and name(None, is_conversation=True) == "plain"
    assert name("facts", is_conversation=True) == "instruction"
    line = wording_of(subject, None, None, is_conversation=False).line
    assert line == (
        "wording: instruction (as task facts was trained; talks was trained as plain: --task or --template chooses)"
    )
    assert wording_of(subject, "chatml", None, is_conversation=False).template == TEMPLATES["chatml"]
    assert wording_of(subject_of(tokenizer), None, None, is_conversation=False).name == "instruction"
    tokenizer.chat_template = OWN
    assert wording_of(subject_of(tokenizer), None, None, is_conversation=False).template == OWN


def test_the_task_chooses_the_prompt_and_one_line_says_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = folder / "run"
    asked = generate(run, split({"instruction": "red", "output": ""})[0], TalkOptions(max_new_tokens=8), raw=True)
    for task in ("first", None):
        assert generate(run, "red", TalkOptions(task=task, max_new_tokens=8)) == asked
    talked = generate(run, "red", TalkOptions(task="last", max_new_tokens=8))
    assert talked == generate(run, "red", TalkOptions(template="chatml", max_new_tokens=8)) != asked
    monkeypatch.setattr(sys, "argv", ["qd2mora", "generate", str(run), "--prompt", "red", "--task", "last"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert capsys.readouterr().err.strip().splitlines() == ["wording: chatml (as task last was trained)"]


def test_an_export_carries_the_template_that_was_trained_with(folder: Path) -> None:
    assert AutoTokenizer.from_pretrained(folder / "hf").chat_template == TEMPLATES["chatml"]
    assert AutoTokenizer.from_pretrained(folder / "run").chat_template is None
    facts, own = Task(name="a", path="x"), Task(name="b", path="x", format="chat")
    ours = own.model_copy(update={"name": "c", "template": "plain"})
    assert template_to_keep(Data(tasks=[facts])) is template_to_keep(Data(tasks=[facts, own, ours])) is None
    assert template_to_keep(Data(tasks=[facts, ours])) == TEMPLATES["plain"]


def test_instruction_rows_may_be_worded_by_the_tokenizers_template(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"instruction": "Say it.", "input": "red", "output": "sun"}), encoding="utf-8")
    task = Task(name="t", path=str(path), template="tokenizer")
    with pytest.raises(InputRefused, match="no chat template; name one of"):
        prepare(Data(tasks=[task]), tokenizer, 0)
    tokenizer.chat_template = OWN
    (row,) = prepare(Data(tasks=[task]), tokenizer, 0)[0].train
    assert tokenizer.decode(row.ids[: row.masked]) == "[user] Say it.\n\nred</s>\n[assistant] "
    assert tokenizer.decode(row.ids[row.masked :]) == "sun</s>\n" and row.pair.answer == "sun"
    (plain,) = prepare(Data(tasks=[task.model_copy(update={"template": None})]), tokenizer, 0)[0].train
    assert "### Response:" in tokenizer.decode(plain.ids)
    subject = subject_of(tokenizer, task)
    assert wording_of(subject, None, None, is_conversation=False).template == OWN
    joined = task.model_copy(update={"format": "completion", "template": "chatml"})
    with pytest.raises(
        InputRefused, match=r"t\.template: chatml words chats, instructions and judged answers, completion rows are"
    ):
        prepare(Data(tasks=[joined]), tokenizer, 0)


def test_a_run_of_before_is_read_as_it_was_worded(folder: Path, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    text = (folder / "run" / "recipe.yaml").read_text(encoding="utf-8")
    run.recipe.write_text(
        re.sub(r"(format: instruction\n(?:.*\n)*?\s+template:) null", r"\1 tokenizer", text), encoding="utf-8"
    )
    assert [task.template for task in load_recipe(run.recipe).data.tasks] == ["tokenizer", "chatml"]
    run.manifest.write_text("{}", encoding="utf-8")
    assert [task.template for task in read_recipe(run.path).data.tasks] == [None, "chatml"]
    run.manifest.write_text('{"clock": "2026-01-01T00:00:00"}', encoding="utf-8")
    assert [task.template for task in read_recipe(run.path).data.tasks] == ["tokenizer", "chatml"]
