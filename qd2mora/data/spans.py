"""Spans of a row's text in which an adapter of their own acts: what a row says of them, and which tokens they take in.

A mark is the number of a span's adapter among `data.spans`, from 1; 0 is no span. Where a text is worded by something
that may move it (a chat template), signs that no text holds are set around its spans first and taken out again.
"""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from qd2mora.data.file_rows import BadRow
from qd2mora.data.pair import Part
from qd2mora.data.row_text import from_json, says_something, shortened

KEY = "spans"
"""The field of a row that lists them."""
_FIRST = 0xF0000  # of a plane of Unicode that is for private use: two signs a span
_MOST = 8192
_SIGN = re.compile(f"[{chr(_FIRST)}-{chr(_FIRST + 2 * _MOST - 1)}]")


class Span(NamedTuple):
    """The letters `start` to `stop` of one text of a row: a field by its name, or a message by its number."""

    place: str | int
    mark: int
    start: int
    stop: int


def read_spans(given: object, names: Sequence[str], texts: Mapping[str, str] | Mapping[int, str]) -> list[Span]:
    """Return a row's spans in the order of its texts; `names`: the adapters there are. Raises BadRow."""
    listed = from_json(f"field '{KEY}'", given) if says_something(given) else []
    if not isinstance(listed, list) or not all(isinstance(each, dict) for each in listed):
        raise BadRow(f"field '{KEY}' should be a list of objects", f", it is {shortened(listed)}")
    if len(listed) > _MOST:
        raise BadRow(f"field '{KEY}' has more than {_MOST} spans")
    order = list(texts)
    found = sorted((_span(each, names, texts) for each in listed), key=lambda each: (order.index(each.place), each[2:]))
    for one, other in itertools.pairwise(found):
        if one.place == other.place and other.start < one.stop:
            raise BadRow("two spans overlap", f": {one.start} to {one.stop} and {other.start} to {other.stop}")
    return found


def _span(given: dict[str, object], names: Sequence[str], texts: Mapping[str, str] | Mapping[int, str]) -> Span:
    of_messages = any(isinstance(place, int) for place in texts)
    key = "message" if of_messages else "field"
    for name in given:
        if name not in (key, "start", "end", "adapter"):
            raise BadRow("a span has a key that nothing reads", f": {name[:40]!r}; {key}, start, end and adapter are")
    place = given.get(key)
    if isinstance(place, bool) or place not in list(texts):
        known = "a message's number from 0" if of_messages else " or ".join(map(str, texts))
        raise BadRow(f"a span's '{key}' names no text of the row", f": {shortened(place)}; {known}")
    adapter = given.get("adapter")
    if adapter not in names:
        raise BadRow("a span names an unknown adapter", f": {shortened(adapter)}; data.spans has {', '.join(names)}")
    text = dict(texts)[place]  # type: ignore[index]  # it is one of the keys
    start, stop = given.get("start", 0), given.get("end", len(text))
    ends = (start, stop)
    if any(isinstance(end, bool) or not isinstance(end, int) for end in ends):
        raise BadRow("a span's ends should be whole numbers", f", they are {shortened(start)}, {shortened(stop)}")
    assert isinstance(start, int) and isinstance(stop, int) and isinstance(place, str | int)
    if not 0 <= start < stop <= len(text):
        raise BadRow("a span lies outside of its text", f": {start} to {stop} of {len(text)} letters in {place}")
    return Span(place, names.index(str(adapter)) + 1, start, stop)


def joined(spans: Iterable[Span], texts: Mapping[str, str]) -> tuple[Part, ...]:
    """Return spans of texts that follow each other, in letters of all of them."""
    starts = dict(zip(texts, itertools.accumulate(map(len, texts.values()), initial=0), strict=False))
    return tuple(
        (span.mark, starts[str(span.place)] + span.start, starts[str(span.place)] + span.stop) for span in spans
    )


def signed(text: str, spans: Iterable[tuple[int, Span]]) -> str:
    """Return a text with signs around its spans, each by its number, in order; white space at their ends stays outside.

    A template may trim what a message begins and ends with. Raises BadRow.
    """
    if _SIGN.search(text):
        raise BadRow("a marked text holds letters for private use", f" from U+{_FIRST:X}; take them out")
    pieces, place = [], 0
    for number, span in spans:
        marked = text[span.start : span.stop]
        if not marked.strip():
            raise BadRow("a span marks white space alone", f": {span.start} to {span.stop} in {span.place}")
        start = span.start + len(marked) - len(marked.lstrip())
        stop = span.start + len(marked.rstrip())
        first, last = (chr(_FIRST + 2 * number + end) for end in (0, 1))
        pieces += [text[place:start], first, text[start:stop], last]
        place = stop
    return "".join([*pieces, text[place:]])


def unsigned(text: str) -> tuple[str, dict[int, tuple[int, int]]]:
    """Return a text without signs, and where the span of each number stands in it. Raises BadRow."""
    places: dict[int, int] = {}
    for before, sign in enumerate(_SIGN.finditer(text)):
        number = ord(sign.group()) - _FIRST
        if number in places:
            raise BadRow("the chat template words a marked text twice", "; template: chatml or plain words it once")
        places[number] = sign.start() - before
    found = {number // 2: (start, places.get(number + 1, -1)) for number, start in places.items() if number % 2 == 0}
    return _SIGN.sub("", text), {number: ends for number, ends in found.items() if ends[0] < ends[1]}


def marks_of(offsets: Iterable[tuple[int, int]], spans: Sequence[Part]) -> tuple[Part, ...]:
    """Return spans in tokens, given each token's letters: a token is in the first span that it reaches into."""
    found: list[Part] = []
    waiting = list(spans)
    for token, (start, stop) in enumerate(offsets):
        while waiting and start >= waiting[0][2]:
            waiting.pop(0)
        if not (waiting and start < stop and stop > waiting[0][1]):
            continue
        mark = waiting[0][0]
        if found and found[-1][0] == mark and found[-1][2] == token:
            found[-1] = (mark, found[-1][1], token + 1)
        else:
            found.append((mark, token, token + 1))
    return tuple(found)


__all__ = ["KEY", "Span", "joined", "marks_of", "read_spans", "signed", "unsigned"]
