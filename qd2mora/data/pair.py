"""One example as text: what reading makes of a row, and tokenising takes."""

from dataclasses import dataclass

Vector = tuple[float, ...]

Part = tuple[int, int, int]
"""What a stretch of a conversation is (WORDED and so on), where it begins and where it ends."""
WORDED, SAID, CALLED, REASONED = range(4)
"""Kinds of parts: the template's own words, what somebody says, tools with their calls and results, reasoning."""


@dataclass(frozen=True)
class Pair:
    """One example as text.

    `segments`: a conversation whole, given and learned in turn, special tokens in it; `prompt` is all of it before the
    last answer. `starts_word`: the answer is tokenised as a text of its own, with the space that SentencePiece puts
    before one, as published prompts are trained; else it goes on where the prompt ends.
    """

    prompt: str
    answer: str
    vector: Vector | None = None
    segments: tuple[str, ...] = ()
    starts_word: bool = False
    continues: bool = False
    """Made of the same row of the file as the one before it."""
    is_document: bool = False
    """Learned whole, and as several rows where it is longer than one."""
    is_marked: bool = False
    """The template marks what is learned: tokens that reach into it are; a last segment may follow that is given."""
    worth: float | None = None
    """What the data says of the answer: 1 good and 0 bad, or by how much it is better than the one it stands beside."""
    against: str = ""
    """The answer that this one is compared with."""
    spans: tuple[Part, ...] | None = None
    """The mark of each marked span and its letters in the whole text; None where the data marks none."""
    parts: tuple[Part, ...] = ()
    """What a conversation consists of, in letters of its text, where that is not the template's own words."""


__all__ = ["CALLED", "REASONED", "SAID", "WORDED", "Pair", "Part", "Vector"]
