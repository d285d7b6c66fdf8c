"""The multiple choice format: a `question`, its `choices`, and which is right; the letter of the right one is learned.

`choices` is a list of texts, or the {text: [...], label: [...]} of many published sets. `answer` is a letter (or one of
those labels), the right text itself, or a number that counts from 0.
"""

import string

from qd2mora.data.file_rows import BadRow
from qd2mora.data.row_format import Fields, RowFormat


def split(row: Fields) -> tuple[str, str]:
    """Return (prompt, answer). Raises BadRow where the choices are no list of texts, or the answer is none of them."""
    choices, labels = _choices(row["choices"])
    letters = string.ascii_uppercase[: len(choices)]
    lines = [f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True)]
    right = _right(row["answer"], choices, labels or list(letters))
    return "\n".join([row["question"], *lines, "Answer: "]), letters[right]


def _choices(value: object) -> tuple[list[str], list[str]]:
    """Return the texts, and the labels that a row brings itself."""
    labels: list[str] = []
    if isinstance(value, dict):
        texts, theirs = value.get("text"), value.get("label")
        if isinstance(texts, list) and isinstance(theirs, list):
            value, labels = texts, [str(label) for label in theirs]
    if not isinstance(value, list) or not all(isinstance(each, str) and each.strip() for each in value):
        raise BadRow("field 'choices' should be a list of texts")
    if not 2 <= len(value) <= len(string.ascii_uppercase) or (labels and len(labels) != len(value)):
        raise BadRow("field 'choices' should hold 2 to 26 texts", f", it holds {len(value)}")
    return value, labels


def _right(answer: object, choices: list[str], labels: list[str]) -> int:
    """Return the number of the right choice."""
    if isinstance(answer, str):
        for known in (labels, choices):
            if known.count(answer.strip()) == 1:
                return known.index(answer.strip())
        if answer.strip().isdecimal() and len(answer) < 4:
            answer = int(answer)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    raise BadRow("the answer is outside the choices", f": {repr(answer)[:40]} of {', '.join(labels)}")


FORMAT = RowFormat(("question", "choices", "answer"), split, texts=("question",), asks=("question",), starts_word=True)

__all__ = ["FORMAT", "split"]
