"""The text format: a `text` is a document, learned whole, with the end token behind it."""

from qd2mora.data.row_format import Fields, RowFormat


def split(row: Fields) -> tuple[str, str]:
    """Return (prompt, answer): nothing is given."""
    return "", row["text"]


FORMAT = RowFormat(("text",), split, texts=("text",), is_document=True)

__all__ = ["FORMAT", "split"]
