"""What a format is: which fields its rows have, and how a row becomes a prompt and an answer.

A format is a file with a `FORMAT` in it and a row in the table of `formats`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Fields = dict[str, Any]
"""A row's fields under the format's names; those of `texts` are texts, the others are what the file holds."""
Names = Mapping[str, str | list[str]]
"""What a file calls a format's fields."""


def worthless(row: Fields) -> float | None:
    """Return what an answer is worth where a row does not tell."""
    return None


@dataclass(frozen=True)
class RowFormat:
    """`split` returns prompt and answer, or raises BadRow; None where a chat template words the row.

    `texts`: the fields that are text; `split` checks the others. `asks`: fields of which one must say something.
    `starts_word`: answers are tokenised as texts of their own. `inner`: names inside a field that a recipe may map.
    `built`: optional fields that are no text. `aliases`: what files that a recipe maps nothing of may call a field too.
    `is_document`: a row is learned whole, and becomes several where it is long. `answers`: fields that answer one
    prompt and are judged, the better one first; `worth`: what the row says of them in a number, or raises BadRow.
    """

    fields: tuple[str, ...]
    split: Callable[[Fields], tuple[str, str]] | None
    texts: tuple[str, ...]
    optional: tuple[str, ...] = ()
    inner: tuple[str, ...] = ()
    asks: tuple[str, ...] = ()
    starts_word: bool = False
    is_document: bool = False
    built: tuple[str, ...] = ()
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    answers: tuple[str, ...] = ()
    worth: Callable[[Fields], float | None] = worthless

    @property
    def is_compared(self) -> bool:
        """Whether a row has two answers, which run together."""
        return len(self.answers) > 1

    @property
    def names(self) -> tuple[str, ...]:
        """Everything that a recipe may map to names of the file's own."""
        return (*self.fields, *self.optional, *self.inner)

    def called(self, name: str, row: Fields, names: Names) -> str | list[str]:
        """Return what a row calls a field; `names`: what a recipe says that the file calls it."""
        if name in names:
            return names[name]
        return next((each for each in (name, *self.aliases.get(name, ())) if row.get(each) is not None), name)


__all__ = ["Fields", "Names", "RowFormat"]
