"""Ways to write an answer beside a model alone and greedily: contrasted, and drawn several times and voted on."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from qd2mora.data import Row
from qd2mora.errors import InputRefused
from qd2mora.evaluation.contrast import Contrast
from qd2mora.evaluation.decoding import Decoding, Wanted
from qd2mora.evaluation.joint import JointDecoding
from qd2mora.evaluation.subject import Subject
from qd2mora.evaluation.suites import extracted
from qd2mora.evaluation.votes import TEMPERATURE, Vote, majority


@dataclass(frozen=True)
class Way:
    """How answers are written. `samples`: how many are drawn, at `temperature`, and voted on.

    extract: what counts of a text, the first match of this pattern (its first group where it has one); else all of it.
    """

    contrast: Contrast | None = None
    samples: int = 1
    temperature: float = 0.0
    seed: int = 0
    extract: str | None = None

    def __post_init__(self) -> None:
        check_pattern(self.extract)
        if self.samples > 1 and self.temperature == 0:
            object.__setattr__(self, "temperature", TEMPERATURE)

    @property
    def is_plain(self) -> bool:
        """Whether it is a model alone, once."""
        return self.contrast is None and self.samples == 1 and self.temperature == 0

    def decoding(self, subject: Subject, wanted: Sequence[Wanted]) -> Decoding | JointDecoding:
        """Return texts on their way. Raises InputRefused where the subject cannot write so."""
        if self.contrast is None:
            return Decoding(subject, wanted)
        return JointDecoding(self.contrast.voices(subject), self.contrast.blend, wanted)

    def votes(self, subject: Subject, wanted: Sequence[Wanted], answer_of: Callable[[str], str]) -> list[Vote]:
        """Return what comes of each text, all samples of all side by side."""
        drawn = [replace(each, seed=each.seed + number) for each in wanted for number in range(self.samples)]
        decoding = self.decoding(subject, drawn)
        while not decoding.is_done:
            decoding.step()
        texts = [answer.text for answer in decoding.answers]
        parts = [texts[start : start + self.samples] for start in range(0, len(texts), self.samples)]
        return [majority(each, answer_of) for each in parts]

    def answers(
        self, subject: Subject, rows: Sequence[Row], max_new_tokens: int, answer_of: Callable[[str], str]
    ) -> list[Vote]:
        """Return what is written after each row's prompt."""
        wanted = [
            Wanted(
                row.ids[: row.masked].tolist(),
                subject.ends,
                max_new_tokens,
                temperature=self.temperature,
                seed=self.seed,
                task=row.task,
                vector=row.pair.vector,
            )
            for row in rows
        ]
        return self.votes(subject, wanted, answer_of)

    def answer_of(self, text: str) -> str:
        """Return what counts of a text: its match of `extract`, else its words."""
        if self.extract is not None:
            return extracted(self.extract, text)
        return " ".join(text.split())


def check_pattern(pattern: str | None) -> None:
    """Refuse what is no regular expression. Raises InputRefused."""
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise InputRefused(f"--extract: '{pattern}' is no regular expression: {error}") from None


def way_of(
    weak: str | None,
    beta: float | None,
    alpha: float | None,
    *,
    samples: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    extract: str | None = None,
) -> Way | None:
    """Return the way that options ask for, None for a model alone and once. Raises InputRefused."""
    contrast = None
    if weak is not None:
        contrast = Contrast(weak, 0.5 if beta is None else beta, 0.1 if alpha is None else alpha)
    elif beta is not None or alpha is not None:
        raise InputRefused("--beta, --alpha: go with --contrast; name base, top1 or uniform")
    if contrast is None and samples == 1 and extract is None:
        return None
    return Way(contrast, samples, temperature, seed, extract)


__all__ = ["Way", "check_pattern", "way_of"]
