"""What a row's fields may hold: text that is text, and what JSON can say."""

import math
from collections.abc import Mapping

from qd2mora.data.file_rows import MAX_ROW_BYTES, BadRow, Repeated, parse_row

DEEPEST = 64
"""How deep lists and objects of a field may stand in each other."""


def check_text(name: str, value: object) -> None:
    """Refuse what is no text, or text that no tokenizer should be given. Raises BadRow."""
    if not isinstance(value, str):
        raise BadRow(f"field '{name}' should be text", f", it is {shortened(value)}")
    if len(value) > MAX_ROW_BYTES:
        raise BadRow(f"field '{name}' is longer than {MAX_ROW_BYTES} characters")
    if "\0" in value:
        raise BadRow(f"field '{name}' holds a NUL character")
    if not value.isascii():
        surrogates = [letter for letter in value if "\ud800" <= letter <= "\udfff"]
        if surrogates and all("\udc80" <= letter <= "\udcff" for letter in surrogates):
            raise BadRow(f"field '{name}' is not UTF-8", "; save it as UTF-8")
        if surrogates:
            raise BadRow(f"field '{name}' holds half a character", " (a lone surrogate), which is no text")


def check_json(name: str, value: object, depth: int = DEEPEST) -> None:
    """Refuse what JSON cannot say, or says twice, anywhere in a value. Raises BadRow."""
    if depth == 0:
        raise BadRow(f"field '{name}' is nested too deeply")
    if isinstance(value, Repeated):
        raise BadRow("a key is given twice", f": {value.key[:40]!r}")
    if isinstance(value, str):
        check_text(name, value)
    elif isinstance(value, list):
        for each in value:
            check_json(name, each, depth - 1)
    elif isinstance(value, dict):
        for key, each in value.items():
            check_text(name, key)
            check_json(name, each, depth - 1)
    elif not (value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value))):
        raise BadRow(f"field '{name}' holds what JSON has not", f": {shortened(value)}")


def from_json(what: str, value: object) -> object:
    """Return a value that may have come as JSON text; `what` names it. Raises BadRow."""
    if not isinstance(value, str):
        return value
    try:
        return parse_row(value)
    except BadRow as error:
        raise BadRow(f"{what}: {error.reason}", str(error).removeprefix(error.reason)) from error


def says_something(value: object) -> bool:
    """Tell whether a value is more than a placeholder."""
    return value not in (None, "", "[]", "{}", [], {})


def shortened(value: object) -> str:
    """Return a value's kind, and what it is where that is short to say."""
    kind = type(value).__name__
    # A container may be nested deeper than repr goes.
    if isinstance(value, Mapping | list | Repeated):
        return kind
    return f"{kind} {repr(value)[:40]}"


__all__ = ["DEEPEST", "check_json", "check_text", "from_json", "says_something", "shortened"]
