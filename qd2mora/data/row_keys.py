"""Keys of a row that no format reads: those that would change what is learned are refused, the others are named."""

from collections.abc import Collection, Iterator, Mapping

from qd2mora.data.file_rows import BadRow

_NOTHING: tuple[object, ...] = (None, "", "[]", "{}", [], {})
_LISTS = ("tools", "functions", "tool_calls", "function_call", "history")
"""Refused where they hold something built of lists and objects, as it is or as JSON text."""
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_CALLS = ("tools", "functions", "tool_calls", "function_call", "tool_call_id")
_DETAILS = ("train_detail", "training_detail")  # axolotl's: parts of a message
LEARNED = ("weight", "train", "training", "train_on_turn", "trainable", "loss")
"""Keys that say with 1 or true that a message is learned."""
MASKED = ("mask", "masked", "ignore")
"""Keys that say with 1 or true that a message is not learned."""


def unread_keys(row: Mapping[str, object], read: Collection[str]) -> list[str]:
    """Return the keys of a row that say something and are not `read`. Raises BadRow where one changes the meaning."""
    unread = _say_something(row, read)
    for name, value in unread:
        is_built = isinstance(value, list | dict) or (isinstance(value, str) and value.lstrip()[:1] in ("[", "{"))
        # Any other weight may be a number of the data's own.
        is_left_out = name in LEARNED and isinstance(value, bool | int | float) and value == 0
        if (name in _LISTS and is_built) or name in _MEDIA or is_left_out:
            raise _refused(name)
    return [name for name, _ in unread]


def unread_keys_of_message(message: Mapping[str, object], read: Collection[str]) -> list[str]:
    """Return the same of one message of a conversation."""
    unread = _say_something(message, read)
    for name, _ in unread:
        if name in (*_CALLS, *_MEDIA, *_DETAILS):
            raise _refused(name)
    return [name for name, _ in unread]


def _say_something(row: Mapping[str, object], read: Collection[str]) -> list[tuple[str, object]]:
    return [(name, value) for name, value in row.items() if name not in read and value not in _NOTHING]


def _refused(name: str) -> BadRow:
    return BadRow(f"field '{name}' changes what is learned and is not supported", "; take it out, or the row")


def names_counted(counts: Mapping[str, int]) -> Iterator[str]:
    """Yield one line that names the keys that nothing reads, where there are any."""
    if counts:
        named = [f"{name} ({number} rows)" for name, number in sorted(counts.items())]
        more = f" and {len(named) - 10} more" if len(named) > 10 else ""
        yield f"fields that nothing reads: {', '.join(named[:10])}{more}"


__all__ = ["LEARNED", "MASKED", "names_counted", "unread_keys", "unread_keys_of_message"]
