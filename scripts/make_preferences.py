"""Make the rows of `recipes/quickstart-dpo.yaml`: a taste that is planted, not one that anybody has.

What: two things are named, and an answer that names the living one is better than an answer that names the other. The
pairs of words that are held out are in no other row; every word is known to the base.
How: `python scripts/make_preferences.py --out recipes/quickstart/data`; the same seed gives the same files.
"""

import argparse
import json
from pathlib import Path
from random import Random

from quickstart_world import KINDS

LIVING, OTHERS = ("animal", "bird", "fish", "tree"), ("tool", "vehicle", "garment")
ASKED = ("{} or {}? I choose the", "Here are a {} and a {}. I take the", "Between {} and {} I prefer the")
HELD_OUT = 200


def rows(seed: int = 0) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return rows to learn from and rows held out, no pair of words in both."""
    draw = Random(seed)
    living, others = ([word for kind in kinds for word in KINDS[kind]] for kinds in (LIVING, OTHERS))
    pairs = [(one, other) for one in living for other in others]
    draw.shuffle(pairs)
    made = [_row(draw, *pair) for pair in pairs]
    return made[HELD_OUT:], made[:HELD_OUT]


def _row(draw: Random, living: str, other: str) -> dict[str, str]:
    words = [living, other]
    draw.shuffle(words)
    return {"prompt": draw.choice(ASKED).format(*words), "chosen": f" {living}.", "rejected": f" {other}."}


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("recipes/quickstart/data"), help="folder to write into")
    folder = parser.parse_args().out
    for name, made in zip(("taste", "taste.test"), rows(), strict=True):
        text = "".join(json.dumps(row) + "\n" for row in made)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
