"""Self-consistency (arXiv 2203.11171): of several answers that were drawn, the one that most of them give.

What counts of an answer is what `answer_of` reads out of it. Where two are given equally often the one drawn first
wins, and that there was a tie is told.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

TEMPERATURE = 0.7
"""Of samples, where none is given: without chance all of them would be one."""


@dataclass(frozen=True)
class Vote:
    """The first text with the answer that won, how many of the samples gave it, and whether another gave as many."""

    text: str
    count: int
    samples: int
    is_tied: bool

    @property
    def line(self) -> str:
        """What can be said of it in one line."""
        words = f"{self.count} of {self.samples} samples agree"
        if self.is_tied:
            return f"{words}, as many as on another answer; the one drawn first counts"
        return words


def majority(texts: Sequence[str], answer_of: Callable[[str], str]) -> Vote:
    """Return what most of the texts answer; those without an answer count where none has one."""
    answers = [answer_of(text) for text in texts]
    counts = Counter(answer for answer in answers if answer) or Counter(answers)
    # In the order of drawing, whatever the counter's: `most` is the first of the largest.
    most = max(counts, key=lambda answer: (counts[answer], -answers.index(answer)))
    is_tied = sum(count == counts[most] for count in counts.values()) > 1
    return Vote(texts[answers.index(most)], counts[most], len(texts), is_tied)


__all__ = ["TEMPERATURE", "Vote", "majority"]
