"""A prompt with one answer or several that are judged: as texts that are joined, or as messages that a template words.

The prompt is a text or the messages of a chat so far; an answer is a text, or the message that answers, with or without
the prompt's messages before it. Nothing but that last message is learned.
"""

from collections.abc import Iterator
from dataclasses import replace

from qd2mora.data.conversation import Conversation, read_conversation
from qd2mora.data.file_rows import BadRow
from qd2mora.data.pair import Pair
from qd2mora.data.row_format import Fields, Names, RowFormat
from qd2mora.data.row_text import check_text, from_json
from qd2mora.data.turns import Turns

_EQUAL = "are equal"


def answered(
    row_format: RowFormat, row: Fields, names: Names, turns: Turns | None
) -> tuple[list[Pair], list[str], tuple[str, ...]]:
    """Return a pair for each answer, remarks on the messages, and keys of them that nothing reads. Raises BadRow."""
    worth = row_format.worth(row)
    if turns is None:
        pairs = list(_joined(row_format, row, names))
        remarks, unread = list[str](), tuple[str, ...]()
    else:
        talks = [_talk(row, answer, names) for answer in row_format.answers]
        worded = [turns.pairs(talk) for talk in talks]
        pairs = [pair for (pair,), _ in worded]
        remarks = [remark for talk, (_, said) in zip(talks, worded, strict=True) for remark in (*talk.remarks, *said)]
        unread = tuple(dict.fromkeys(key for talk in talks for key in talk.unread))
    texts = [pair.answer.strip() for pair in pairs]
    if len(set(texts)) < len(texts):
        raise BadRow(f"{' and '.join(row_format.answers)} {_EQUAL}", ", there is nothing to prefer")
    others = texts[::-1] if row_format.is_compared else [""]
    pairs = [replace(pair, worth=worth, against=other) for pair, other in zip(pairs, others, strict=True)]
    return pairs, list(dict.fromkeys(remarks)), unread


def _joined(row_format: RowFormat, row: Fields, names: Names) -> Iterator[Pair]:
    for name in ("prompt", *row_format.answers):
        called = str(names.get(name, name))
        if isinstance(row[name], list):
            raise BadRow(f"field '{called}' holds messages", "; name template: tokenizer, which words them")
        check_text(called, row[name])
        _refuse_empty(called, row[name])
    for name in ("system", "tools"):
        if row.get(name):
            raise BadRow(f"field '{name}' has no place in texts that are joined", "; name template: tokenizer")
    for name in row_format.answers:
        yield Pair(row["prompt"], row[name])


def _talk(row: Fields, answer: str, names: Names) -> Conversation:
    """Return a row's conversation up to one of its answers, which alone is learned. Raises BadRow."""
    asked, said = (_messages(row[name], name, names) for name in ("prompt", answer))
    if said[: len(asked)] == asked:
        said = said[len(asked) :]
    if len(said) != 1:
        raise BadRow(
            f"field '{names.get(answer, answer)}' should be one message after the prompt's", f", there are {len(said)}"
        )
    roles = {ours: theirs for ours, theirs in names.items() if isinstance(theirs, str)}
    fields = {"messages": [*asked, *said], "system": row.get("system"), "tools": row.get("tools")}
    talk = read_conversation(fields, roles)
    if talk.messages[-1]["role"] != "assistant":
        raise BadRow(f"field '{names.get(answer, answer)}' should be a message of the assistant")
    learned = (*(False for _ in talk.messages[:-1]), True)
    return replace(talk, is_learned=learned)


def _messages(value: object, name: str, names: Names) -> list[object]:
    """Return a field's messages; a text is one of the user, or of the assistant where it answers. Raises BadRow."""
    called = str(names.get(name, name))
    if isinstance(value, str) and value.lstrip().startswith("[{"):  # as csv files hold it
        value = from_json(f"field '{called}'", value)
    if isinstance(value, list):
        if not value:
            raise BadRow(f"field '{called}' is empty", _WHY_EMPTY)
        return list(value)
    check_text(called, value)
    assert isinstance(value, str)
    _refuse_empty(called, value)
    role = "user" if name == "prompt" else "assistant"
    return [{str(names.get("role", "role")): role, str(names.get("content", "content")): value}]


_WHY_EMPTY = ", there is nothing to compare"


def _refuse_empty(called: str, text: str) -> None:
    if not text.strip():
        raise BadRow(f"field '{called}' is empty", _WHY_EMPTY)


__all__ = ["answered"]
