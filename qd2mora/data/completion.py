"""The completion format: a `prompt` that is given and a `completion` that is learned, joined as they are."""

from qd2mora.data.row_format import Fields, RowFormat


def split(row: Fields) -> tuple[str, str]:
    """Return (prompt, answer)."""
    return row["prompt"], row["completion"]


FORMAT = RowFormat(("prompt", "completion"), split, texts=("prompt", "completion"))

__all__ = ["FORMAT", "split"]
