"""The preference format: a `prompt`, a `chosen` answer and a `rejected` one, as texts or as messages of a chat.

`margin`, where a row has one, says by how much the chosen one is better; an objective may read it.
"""

import math

from qd2mora.data.file_rows import BadRow
from qd2mora.data.row_format import Fields, RowFormat
from qd2mora.data.row_text import shortened


def margin(row: Fields) -> float | None:
    """Return by how much the chosen answer is better, None where the row does not tell. Raises BadRow."""
    value = row.get("margin")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadRow("field 'margin' should be a number", f", it is {shortened(value)}")
    return float(value)


FORMAT = RowFormat(
    ("prompt", "chosen", "rejected"),
    None,
    texts=(),
    optional=("system", "tools", "margin"),
    inner=("role", "content"),
    built=("system", "tools", "margin"),
    answers=("chosen", "rejected"),
    worth=margin,
)

__all__ = ["FORMAT", "margin"]
