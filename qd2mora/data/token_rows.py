"""Rows as tokens, made of a store when they are looked at: one line a row, or two that are compared."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from qd2mora.data.pair import Pair, Part
from qd2mora.data.token_store import TokenStore

Entries = TypeVar("Entries", NDArray[np.int32], NDArray[np.bool_])


@dataclass(frozen=True, eq=False)
class Row:
    """One example as tokens: `ids` whole, of which the first `masked` are not learned but in the spans of `earlier`."""

    task: int
    ids: NDArray[np.int32]
    masked: int
    pair: Pair
    group: int = 0
    earlier: tuple[tuple[int, int], ...] = ()
    parts: tuple[Part, ...] = ()
    """What a conversation consists of, in tokens, where that is not the template's own words."""
    against: "Row | None" = None
    """The worse answer to the same prompt."""
    marks: tuple[Part, ...] | None = None
    """The mark of each marked span and its tokens; those of a prompt alone go on into the answer that it asks for. None
    where the data marks none."""

    @property
    def lines(self) -> tuple["Row", ...]:
        """The texts of it that run through a model together, itself first."""
        return (self,) if self.against is None else (self, self.against)

    def of_task(self, number: int) -> "Row":
        """Return this row with another task's number."""
        against = None if self.against is None else self.against.of_task(number)
        return replace(self, task=number, against=against)

    @property
    def answer_mark(self) -> int:
        """The mark of the answer's first token, under which an answer is written; 0 in no span."""
        return next((mark for mark, start, stop in self.marks or () if start <= self.masked < stop), 0)

    @property
    def asked(self) -> "Row":
        """This row without its answer."""
        return Row(self.task, self.ids[: self.masked], self.masked, self.pair, marks=self.marks)

    def with_answer(self, ids: NDArray[np.int32]) -> "Row":
        """Return this row's prompt with another answer, all of it under the mark of this one's first token."""
        whole, marks = np.concatenate([self.ids[: self.masked], ids]), self.marks
        if marks is not None:
            before = [(mark, start, min(stop, self.masked)) for mark, start, stop in marks if start < self.masked]
            marks = (*before, (self.answer_mark, self.masked, len(whole)))
        return Row(self.task, whole, self.masked, self.pair, marks=marks)

    def with_answer_of(self, other: "Row", longest: int) -> "Row":
        """Return this row's prompt with another row's answer, cut to `longest` tokens."""
        whole = self.with_answer(other.ids[other.masked :])
        return replace(self, ids=whole.ids[:longest], earlier=(), parts=(), marks=whole.marks)

    @property
    def num_tokens(self) -> int:
        """Tokens of all its lines."""
        return sum(len(line.ids) for line in self.lines)

    @property
    def width(self) -> int:
        """Tokens of its longest line."""
        return max(len(line.ids) for line in self.lines)

    @property
    def num_labels(self) -> int:
        """Tokens that are predicted and learned: the first token of a row never is."""
        before = sum(stop - max(start, 1) for start, stop in self.earlier)
        return len(self.ids) - max(self.masked, 1) + before


class TokenRows(Sequence[Row]):
    """Rows of a store that are ready to learn or to ask, made when they are looked at."""

    def __init__(
        self, store: TokenStore, places: NDArray[np.int64], task: int, max_length: int, masking: str, group: int = 0
    ) -> None:
        """`masking`: `turns`, answers are learned; `last`, the last answer alone; `none`, everything is."""
        self.store, self.places, self.task = store, places, task
        self.max_length, self.masking, self.group = max_length, masking, group
        self.starts: NDArray[np.int64] | None = None
        """Where each row begins in its document; None where a row is all that is stored at its place."""

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each row."""
        return np.minimum(self._left, self.max_length)

    @property
    def num_tokens(self) -> NDArray[np.int32]:
        """Tokens of each row's lines."""
        return self.lengths

    @property
    def is_cut(self) -> NDArray[np.bool_]:
        """Whether a row loses its end."""
        if self.starts is not None:
            return np.zeros(len(self), dtype=np.bool_)
        return self._left > self.max_length

    @property
    def _left(self) -> NDArray[np.int32]:
        """Tokens from each row's beginning to the end of what is stored."""
        whole = self.store.lengths[self.places]
        return whole if self.starts is None else (whole - self.starts).astype(np.int32)

    @property
    def is_learned(self) -> NDArray[np.bool_]:
        """Whether anything of a row is learned."""
        if self.starts is not None:
            return self.lengths > 1
        first = {"turns": self.store.first_bounds, "last": self.store.last_bounds}.get(self.masking)
        return self.lengths > (1 if first is None else np.maximum(first[self.places], 1))

    def where(self, chosen: NDArray[np.bool_]) -> "TokenRows":
        """Return some of these rows."""
        rows = TokenRows(self.store, self.places[chosen], self.task, self.max_length, self.masking, self.group)
        if self.starts is not None:
            rows.starts = self.starts[chosen]
        return rows

    def in_pieces(self) -> "TokenRows":
        """Return whole documents as rows of at most `max_length` tokens that lose none.

        A row that goes on begins with the last token of the row before, which is learned there and given here: so each
        token of a document but its first is learned once, with what stands before it in its row.
        """
        # One token is shared by neighbours, so each row adds one less than it holds.
        step = self.max_length - 1
        # A document of n tokens has n - 1 to learn; one of a single token is a row all the same, and dropped as
        # unlearned.
        numbers = np.maximum(1, -(-(self.store.lengths[self.places] - 1) // step))
        before = np.repeat(np.cumsum(numbers) - numbers, numbers)
        places = np.repeat(self.places, numbers)
        rows = TokenRows(self.store, places, self.task, self.max_length, self.masking, self.group)
        rows.starts = (np.arange(len(places)) - before) * step
        return rows

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, number: int) -> Row: ...
    @overload
    def __getitem__(self, number: slice) -> list[Row]: ...
    def __getitem__(self, number: int | slice) -> Row | list[Row]:
        if isinstance(number, slice):
            return [self._row(each) for each in range(*number.indices(len(self)))]
        return self._row(number)

    def _row(self, number: int) -> Row:
        place = int(self.places[number])
        pair = self.store.pair(place)
        if self.starts is not None:
            start = int(self.starts[number])
            ids = self.store.ids(place)[start : start + self.max_length]
            return Row(self.task, ids, 1, pair, self.group)  # the first token is never learned
        ids = self.store.ids(place)[: self.max_length]
        if self.masking == "none":
            return Row(self.task, ids, 0, pair, self.group, marks=self.store.marks(place))
        # Bounds of answers that `max_length` cut off fall on the end, where their spans are empty.
        *before, masked = np.minimum(self.store.bounds(place), len(ids)).tolist()
        spans = zip(before[::2], before[1::2], strict=True) if self.masking == "turns" else ()
        earlier = tuple((start, stop) for start, stop in spans if start < stop)
        parts, marks = self.store.parts(place), self.store.marks(place)
        return Row(self.task, ids, masked, pair, self.group, earlier, parts, marks=marks)


class PairedRows(TokenRows):
    """Rows of two lines each: `places` are those of the better answers, the worse stand one place behind."""

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of the longer line of each row."""
        return self._of_both(lambda rows: rows.lengths, np.maximum)

    @property
    def num_tokens(self) -> NDArray[np.int32]:
        """Tokens of both lines of each row."""
        return self._of_both(lambda rows: rows.lengths, np.add)

    @property
    def is_cut(self) -> NDArray[np.bool_]:
        """Whether a line of a row loses its end."""
        return self._of_both(lambda rows: rows.is_cut, np.logical_or)

    @property
    def is_learned(self) -> NDArray[np.bool_]:
        """Whether both answers have something to be told by."""
        return self._of_both(lambda rows: rows.is_learned, np.logical_and)

    def where(self, chosen: NDArray[np.bool_]) -> "PairedRows":
        """Return some of these rows."""
        return PairedRows(self.store, self.places[chosen], self.task, self.max_length, self.masking, self.group)

    def _of_both(
        self, take: Callable[[TokenRows], Entries], together: Callable[[Entries, Entries], Entries]
    ) -> Entries:
        return together(take(self._lines(0)), take(self._lines(1)))

    def _lines(self, number: int) -> TokenRows:
        return TokenRows(self.store, self.places + number, self.task, self.max_length, self.masking, self.group)

    def _row(self, number: int) -> Row:
        return replace(super()._row(number), against=self._lines(1)[number])


def lengths_of(rows: Sequence[Row]) -> NDArray[np.int32]:
    """Return the tokens of each row's longest line, without making rows of what is stored."""
    if isinstance(rows, TokenRows):
        return rows.lengths
    return np.array([row.width for row in rows], dtype=np.int32)


def tokens_of(rows: Sequence[Row]) -> NDArray[np.int32]:
    """Return the tokens of all lines of each row, without making rows of what is stored."""
    if isinstance(rows, TokenRows):
        return rows.num_tokens
    return np.array([row.num_tokens for row in rows], dtype=np.int32)


__all__ = ["PairedRows", "Row", "TokenRows", "lengths_of", "tokens_of"]
