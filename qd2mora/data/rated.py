"""The rated format: a `prompt`, an `answer` to it, as texts or as messages of a chat, and a `label`: good or bad."""

from qd2mora.data.file_rows import BadRow
from qd2mora.data.row_format import Fields, RowFormat
from qd2mora.data.row_text import shortened

GOOD, BAD = 1.0, 0.0
_LABELS = {"good": GOOD, "bad": BAD, "true": GOOD, "false": BAD, "1": GOOD, "0": BAD}


def label(row: Fields) -> float:
    """Return what an answer is worth: `good`, true or 1; `bad`, false or 0. Raises BadRow."""
    value = row["label"]
    said = value.strip().lower() if isinstance(value, str) else str(value).removesuffix(".0").lower()
    if said not in _LABELS:
        raise BadRow("field 'label' should be good or bad", f", it is {shortened(value)}")
    return _LABELS[said]


FORMAT = RowFormat(
    ("prompt", "answer", "label"),
    None,
    texts=(),
    optional=("system", "tools"),
    inner=("role", "content"),
    built=("system", "tools"),
    answers=("answer",),
    worth=label,
)

__all__ = ["BAD", "FORMAT", "GOOD", "label"]
