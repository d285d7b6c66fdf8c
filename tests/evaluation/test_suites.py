"""Suites: the published prompt byte for byte, the published way of reading an answer, and what is refused."""

import json
from pathlib import Path

import pytest

from qd2mora.errors import InputRefused
from qd2mora.evaluation.suites import SUITES, extracted, find_suite, read_items

SUITE = SUITES["commonsense"]
TASKS = {task.name: task for task in SUITE.tasks}


def write(folder: Path, rows: list[object]) -> Path:
    (folder / "boolq.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder


def test_the_prompt_is_the_published_one_and_the_training_one_differs_in_white_space_alone(tmp_path: Path) -> None:
    row = {"instruction": "Is {input} true?\n\nAnswer format: true/false", "output": "?", "answer": "true"}
    (item,) = read_items(SUITE, TASKS["boolq"], write(tmp_path, [row]), "published")
    assert item.pair.prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request. \n"
        "\n                ### Instruction:\n                Is {input} true?\n\nAnswer format: true/false\n"
        "\n                ### Response:\n                "
    )
    assert (item.pair.answer, item.label, item.choices) == ("the correct answer is true", "true", ("true", "false"))
    (trained,) = read_items(SUITE, TASKS["boolq"], tmp_path, "training")
    assert trained.pair.prompt != item.pair.prompt and trained.pair.prompt.split() == item.pair.prompt.split()


@pytest.mark.parametrize(
    ("task", "text", "label"),
    [
        ("boolq", "the correct answer is true", "true"),
        ("boolq", "untrue, false", "true"),  # the published pattern knows no word boundaries
        ("boolq", "yes", ""),
        ("siqa", "answer5 or answer1", "answer5"),
        ("piqa", "solution3, solution2", "solution2"),
        ("winogrande", "Option1", ""),
        ("hellaswag", "ending4", "ending4"),
    ],
)
def test_an_answer_is_the_first_match(task: str, text: str, label: str) -> None:
    assert extracted(TASKS[task].pattern, text) == label


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"instruction": "x", "output": "y"}, "boolq.json, row 2: no text in field 'answer'; scoring needs the right"),
        ({"instruction": "x", "answer": "maybe"}, "row 2: answer 'maybe' is none of true, false"),
        ({"answer": "true"}, "row 2: no text in field 'instruction'"),
        ([], "row 2: no text in field 'instruction'"),
    ],
)
def test_a_row_that_cannot_be_scored_is_named(row: object, words: str, tmp_path: Path) -> None:
    good = {"instruction": "x", "answer": "true"}
    with pytest.raises(InputRefused, match=words):
        read_items(SUITE, TASKS["boolq"], write(tmp_path, [good, row]), "published")


def test_files_and_suites_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=r"holds no piqa\.json, piqa\.jsonl or piqa/test\.json"):
        read_items(SUITE, TASKS["piqa"], tmp_path, "published")
    with pytest.raises(InputRefused, match="no folder"):
        read_items(SUITE, TASKS["piqa"], tmp_path / "nowhere", "published")
    with pytest.raises(InputRefused, match="did you mean 'commonsense'"):
        find_suite("comonsense")


@pytest.mark.parametrize(
    ("task", "text", "label", "prompt", "texts"),
    [
        (
            "boolq",
            "Please answer the following question with true or false, question: is ice cold?\n\n"
            "Answer format: true/false",
            "true",
            "Question: is ice cold?\nAnswer:",
            (" true", " false"),
        ),
        (
            "arc_e",
            "Please choose the correct answer to the question: What melts: ice?\n\nAnswer1: ice Answer2: a stone\n\n"
            "Answer format: answer1/answer2",
            "answer1",
            "Question: What melts: ice?\nAnswer:",
            (" ice", " a stone"),
        ),
        (
            "hellaswag",
            "Please choose the correct ending to complete the given sentence: Ice: Then it\n\n"
            "Ending1: melts. Ending2: burns. Ending3: sings. Ending4: flies.\n\n"
            "Answer format: ending1/ending2/ending3/ending4",
            "ending3",
            "Ice: Then it",
            (" melts.", " burns.", " sings.", " flies."),
        ),
        (
            "winogrande",
            "Please choose the correct answer to fill in the blank to complete the given sentence: "
            "Ann saw Bo as _ ran.\n\n"
            "Option1: Ann Option2: Bo Answer format: option1/option2",
            "option2",
            "Ann saw Bo as",
            (" Ann ran.", " Bo ran."),
        ),
    ],
)
def test_a_cloze_is_the_question_alone_and_the_choices_own_words(
    task: str, text: str, label: str, prompt: str, texts: tuple[str, ...], tmp_path: Path
) -> None:
    row = {"instruction": text, "output": "?", "answer": label}
    (tmp_path / f"{TASKS[task].file}.json").write_text(json.dumps([row]), encoding="utf-8")
    (item,) = read_items(SUITE, TASKS[task], tmp_path, "cloze")
    assert (item.pair.prompt, item.texts) == (prompt, texts)
    assert item.pair.answer == texts[item.choices.index(label)]


def test_a_cloze_of_a_row_without_its_choices_is_refused_by_row(tmp_path: Path) -> None:
    row = {"instruction": "What melts?\n\nAnswer format: answer1/answer2", "output": "?", "answer": "answer1"}
    (tmp_path / "ARC-Easy.json").write_text(json.dumps([row]), encoding="utf-8")
    with pytest.raises(InputRefused, match="no question with its choices"):
        read_items(SUITE, TASKS["arc_e"], tmp_path, "cloze")
