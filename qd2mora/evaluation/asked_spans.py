"""Spans of a prompt as they are typed: `ADAPTER=START:END` in letters of the prompt, and the mark an answer is under.

`ADAPTER=START:` goes on to the end of the prompt and into the answer, `ADAPTER=answer` is the answer alone.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from qd2mora.data.file_rows import BadRow
from qd2mora.data.spans import Span, marks_of, read_spans, signed, unsigned
from qd2mora.data.tokenise import Tokeniser
from qd2mora.errors import InputRefused
from qd2mora.evaluation.decoding import Wanted
from qd2mora.evaluation.subject import Subject

Read = TypeVar("Read")
_TYPED = re.compile(r"([^=]+)=(?:(answer)|(\d{1,9}):(\d{1,9})?)", re.ASCII)
NOTHING_MARKED = "no --span marks anything: the answer is the base's own"


@dataclass(frozen=True)
class AskedSpans:
    """Spans of one prompt, and the mark of its answer; 0 is none."""

    spans: tuple[Span, ...] = ()
    answer_mark: int = 0

    def signed(self, prompt: str) -> str:
        """Return the prompt with signs around its spans, which its wording carries along."""
        return _as_refused(lambda: signed(prompt, enumerate(self.spans))) if self.spans else prompt

    def taken_out(self, text: str) -> tuple[str, dict[int, tuple[int, int]]]:
        """Return a worded text without the signs of its spans, and where they stood. Raises InputRefused."""
        return _as_refused(lambda: unsigned(text)) if self.spans else (text, {})

    def told(self, subject: Subject, text: str, wanted: Wanted, places: Mapping[int, tuple[int, int]]) -> Wanted:
        """Return what is wanted of a worded text with the marks of its tokens, given the places of its spans."""
        if not subject.reads_spans:
            return wanted
        if len(places) < len(self.spans):
            raise InputRefused("--span: the wording leaves a marked text out; --raw continues the prompt as it is")
        found = sorted(((self.spans[number].mark, *ends) for number, ends in places.items()), key=lambda each: each[1])
        marks = [0] * len(wanted.ids)
        if found:
            for mark, start, stop in marks_of(Tokeniser(subject.tokenizer).letters_of(text, wanted.ids), found):
                marks[start:stop] = [mark] * (stop - start)
        return replace(wanted, marks=tuple(marks), answer_mark=self.answer_mark)


def asked_spans(subject: Subject, typed: Sequence[str], prompt: str) -> AskedSpans | None:
    """Return what is typed of a prompt's spans; None where the adapter reads none. Raises InputRefused."""
    if not subject.reads_spans:
        if typed:
            raise InputRefused("--span: this model has no adapters that act in spans; leave it out")
        return None
    assert subject.run is not None
    names, answer_mark = subject.run.recipe.data.spans or [], 0
    listed: list[dict[str, object]] = []
    for each in typed:
        found = _TYPED.fullmatch(each)
        if found is None:
            raise InputRefused(f"--span: '{each}' will not do: ADAPTER=START:END in letters, or ADAPTER=answer")
        name, answer, start, end = found.groups()
        if name not in names:
            raise InputRefused(f"--span: no adapter '{name}' in this run; there are {', '.join(names)}")
        if answer or end is None:
            if answer_mark:
                raise InputRefused(f"--span: '{each}' and another one both go on into the answer; one can")
            answer_mark = names.index(name) + 1
        if not answer:
            of_end = {} if end is None else {"end": int(end)}
            listed.append({"field": "the prompt", "adapter": name, "start": int(start), **of_end})
    spans = _as_refused(lambda: read_spans(listed, names, {"the prompt": prompt}))
    return AskedSpans(tuple(spans), answer_mark)


def _as_refused(read: Callable[[], Read]) -> Read:
    try:
        return read()
    except BadRow as error:
        raise InputRefused(f"--span: {error}") from error


__all__ = ["NOTHING_MARKED", "AskedSpans", "asked_spans"]
