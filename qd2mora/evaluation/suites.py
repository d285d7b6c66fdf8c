"""Published test suites as data: files, prompts, how an answer is read out of a text, what the choices are.

`commonsense`: the eight tasks of LLM-Adapters (github AGI-Edgerunners/LLM-Adapters, commonsense_evaluate.py), as every
commonsense table of the field asks them. Their evaluation prompt differs from the training prompt in white space; both
are here, and the published one is asked. An answer is the first match of the task's pattern in at most 32 new tokens.

A model that was never trained on such rows does not know what `answer2` stands for, and is at chance. `cloze` asks it
as base models are asked: the question alone, and of each choice how likely its own words are.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qd2mora.data import instruction
from qd2mora.data.file_rows import BadRow, rows_of
from qd2mora.data.pair import Pair
from qd2mora.errors import InputRefused, nearest
from qd2mora.recipe import Task

# The published evaluation's own white space: its prompt was written in an indented string, and other tokens would give
# other scores.
_INDENT = " " * 16
_PUBLISHED = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request. \n\n"
    f"{_INDENT}### Instruction:\n{_INDENT}{{instruction}}\n\n{_INDENT}### Response:\n{_INDENT}"
)
PROMPTS = ("published", "training", "cloze")
_CHOICE = re.compile(r"(?:Answer|Solution|Ending|Option)\d:")


@dataclass(frozen=True)
class SuiteTask:
    """One task of a suite; `choices` are the labels there can be, and a row may have fewer of them."""

    name: str
    file: str
    choices: tuple[str, ...]

    @property
    def pattern(self) -> str:
        return "|".join(self.choices)


@dataclass(frozen=True)
class Suite:
    """A suite; `answer` is the text in which a label is given, learned in training and weighed in likelihoods."""

    tasks: tuple[SuiteTask, ...]
    answer: str
    max_new_tokens: int


@dataclass(frozen=True)
class Item:
    """One row of a test file: the prompt with its right answer, the label, and what to choose from.

    texts: what is weighed for each of the choices, the right one's being the pair's answer.
    """

    pair: Pair
    label: str
    choices: tuple[str, ...]
    texts: tuple[str, ...]


def _numbered(word: str, count: int) -> tuple[str, ...]:
    return tuple(f"{word}{number}" for number in range(1, count + 1))


SUITES = {
    "commonsense": Suite(
        tasks=(
            SuiteTask("boolq", "boolq", ("true", "false")),
            SuiteTask("piqa", "piqa", _numbered("solution", 2)),
            SuiteTask("siqa", "social_i_qa", _numbered("answer", 5)),
            SuiteTask("hellaswag", "hellaswag", _numbered("ending", 4)),
            SuiteTask("winogrande", "winogrande", _numbered("option", 2)),
            SuiteTask("arc_e", "ARC-Easy", _numbered("answer", 5)),
            SuiteTask("arc_c", "ARC-Challenge", _numbered("answer", 5)),
            SuiteTask("obqa", "openbookqa", _numbered("answer", 5)),
        ),
        answer="the correct answer is {label}",
        max_new_tokens=32,
    )
}


def find_suite(name: str) -> Suite:
    """Return a suite. Raises InputRefused naming the nearest one."""
    if name not in SUITES:
        raise InputRefused(f"--suite: unknown suite '{name}'; {nearest(name, SUITES)}")
    return SUITES[name]


def suite_task_names(name: str, only: Collection[str] = ()) -> list[str]:
    """Return a suite's tasks, or those in `only`. Raises InputRefused naming the nearest one."""
    names = [task.name for task in find_suite(name).tasks]
    for wanted in only:
        if wanted not in names:
            raise InputRefused(f"--tasks: no task '{wanted}' in suite {name}; {nearest(wanted, names)}")
    return [each for each in names if not only or each in only]


def read_items(suite: Suite, task: SuiteTask, folder: Path, prompt: str, limit: int | None = None) -> list[Item]:
    """Read a task's test rows from `folder`: FILE.json, FILE.jsonl or FILE/test.json.

    Raises InputRefused with file and row, also where a row has no answer or one that is not among the choices.
    """
    path = _file_of(task, folder)
    items: list[Item] = []
    for place, row in rows_of(path, Task(name=task.name, path=path)):
        if len(items) == limit:
            break
        try:
            items.append(_item(suite, task, row, prompt))
        except BadRow as error:
            raise InputRefused(f"{path}, {place}: {error}") from error
    if not items:
        raise InputRefused(f"{path}: no rows")
    return items


def extracted(pattern: str, text: str) -> str:
    """Return the first label in a text, or nothing; of a pattern with a group, what that holds."""
    found = re.search(pattern, text)
    if found is None:
        return ""
    return found.group(1 if found.re.groups else 0) or ""


def _file_of(task: SuiteTask, folder: Path) -> str:
    if not folder.is_dir():
        raise InputRefused(f"--data: no folder '{folder}'; name the folder of the suite's test files")
    places = [folder / f"{task.file}.json", folder / f"{task.file}.jsonl", folder / task.file / "test.json"]
    for place in places:
        if place.is_file():
            return str(place)
    raise InputRefused(f"--data: '{folder}' holds no {task.file}.json, {task.file}.jsonl or {task.file}/test.json")


def _item(suite: Suite, task: SuiteTask, row: Any, prompt: str) -> Item:
    if isinstance(row, BadRow):
        raise row
    for name in ("instruction", "answer"):
        if not isinstance(row, dict) or not isinstance(row.get(name), str) or not row[name].strip():
            why = "; scoring needs the right answers" if name == "answer" else ""
            raise BadRow(f"no text in field '{name}'", why)
    label = row["answer"].strip()
    if label not in task.choices:
        raise BadRow(f"answer '{label[:40]}' is none of {', '.join(task.choices)}")
    choices = _offered(task, row["instruction"], label)
    if prompt == "cloze":
        asked, texts = _cloze(row["instruction"], choices)
        return Item(Pair(asked, texts[choices.index(label)]), label, choices, texts)
    right = suite.answer.replace("{label}", label)
    if prompt == "training":
        asked = instruction.split({"instruction": row["instruction"], "output": right})[0]
    else:
        asked = _PUBLISHED.replace("{instruction}", row["instruction"], 1)
    texts = tuple(suite.answer.replace("{label}", each) for each in choices)
    return Item(Pair(asked, right, starts_word=True), label, choices, texts)


def _cloze(text: str, choices: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """Return a question, and the words of each choice as they would go on from it.

    A sentence that a choice ends, or whose blank it fills, is no question: it is given up to there. Of a choice that
    fills a blank the rest of the sentence is weighed too. Raises BadRow.
    """
    before, *offered = _CHOICE.split(text.rpartition("Answer format:")[0])
    task, _, question = before.strip().partition(": ")
    words = [each.strip() for each in offered] or list(choices)  # true and false are their own words
    if len(words) < len(choices) or not question:
        raise BadRow("no question with its choices", "; give them as `Answer1: ... Answer2: ...`")
    question = question.removeprefix("question: ").strip()
    if "given sentence" not in task:
        return f"Question: {question}\nAnswer:", tuple(f" {each}" for each in words[: len(choices)])
    question, _, rest = question.partition("_")
    return question.strip(), tuple(f" {each}{rest}" for each in words[: len(choices)])


def _offered(task: SuiteTask, text: str, label: str) -> tuple[str, ...]:
    """Return the labels that the row itself offers, in its last line `Answer format: answer1/answer2/answer3`."""
    offered = set(text.rpartition("Answer format:")[2].strip().split("/"))
    found = tuple(choice for choice in task.choices if choice in offered)
    if label in found:
        return found
    return task.choices


__all__ = [
    "PROMPTS",
    "SUITES",
    "Item",
    "Suite",
    "SuiteTask",
    "extracted",
    "find_suite",
    "read_items",
    "suite_task_names",
]
