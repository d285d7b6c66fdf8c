"""The texts that the small base reads: what is known, in running prose, and never the tasks' own instructions.

What: `documents` reads the folder of real data (commonsense train pools, reasoning tasks, GSM8K, wikitext, plays) and
returns its documents. A pool's row becomes a sentence: the question, or the text to complete, with the right choice.
Why: a base that has read about the world of the tasks and has never met their form is what an adapter is for. Test
rows are not among it.
How: `scripts/make_small_base.py` is the program.
"""

import gzip
import json
import re
from pathlib import Path
from typing import Any

_CHOICE = re.compile(r"\s*(?:Answer|Solution|Ending|Option)(\d): ")
_FORMAT = re.compile(r"\s*Answer format: .*$", re.DOTALL)
_PARAGRAPH = 1500  # characters of a piece of a long text
_LONG = ("wikitext2_valid.tokens.txt", "wikitext2_test.raw.txt", "tinyshakespeare.txt", "tinystories_sample.txt")


def documents(data: Path) -> list[str]:
    """Return every document, in a fixed order. Raises OSError, ValueError."""
    texts = []
    for path in sorted((data / "commonsense" / "train").glob("*.json.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            texts += [sentence(row) for row in json.load(file)]
    for path in sorted((data / "multitask_cot").glob("*.json")):
        rows = json.loads(path.read_text(encoding="utf-8"))
        texts += [f"{row['instruction']}\n{row['rationale']} So it is {row['output']}." for row in rows]
    for line in (data / "math" / "gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        texts.append(f"{row['question']}\n{row['answer']}")
    for name in _LONG:
        texts += pieces((data / "text" / name).read_text(encoding="utf-8"))
    return texts


def sentence(row: dict[str, Any]) -> str:
    """Return a multiple-choice row as prose: the question with the right choice's own words."""
    asked = _FORMAT.sub("", row["instruction"].partition(": ")[2]).strip()
    stem, *parts = _CHOICE.split(asked)
    if not parts:  # true or false
        return f"{stem} {row['answer']}."
    choices = dict(zip(parts[::2], parts[1::2], strict=True))
    right = choices[row["answer"][-1]].strip()
    return stem.replace(" _", f" {right}") if " _" in stem else f"{stem.strip()} {right}"


def pieces(text: str) -> list[str]:
    """Return a long text in pieces of whole lines."""
    found, piece = [], ""
    for line in text.splitlines(keepends=True):
        piece += line
        if len(piece) >= _PARAGRAPH:
            found.append(piece.strip())
            piece = ""
    return [each for each in (*found, piece.strip()) if each]
