"""The completion format: a `prompt` that is given and a `completion` that is learned, joined as they are."""

from typing import Any

FIELDS = ("prompt", "completion")


def split(row: dict[str, Any]) -> tuple[str, str]:
    """Return (prompt, answer)."""
    return row["prompt"], row["completion"]


__all__ = ["FIELDS", "split"]
