"""Cells of tables: groups of what is alike, numbers that may be missing, columns of words and of numbers."""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TypeVar

from rich.table import Table

Each = TypeVar("Each")
Key = TypeVar("Key")


def grouped(all_of_them: Iterable[Each], key: Callable[[Each], Key]) -> dict[Key, list[Each]]:
    """Return what has the same key together, in the order of first sight."""
    groups: dict[Key, list[Each]] = {}
    for each in all_of_them:
        groups.setdefault(key(each), []).append(each)
    return groups


def written(value: float | None, form: str = ".3f") -> str:
    """Return a number as text, nothing where it is not known."""
    if value is None:
        return ""
    return format(value, form)


def clock_time(seconds: float) -> str:
    """Return hours, minutes and seconds as 1:02:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}"


def with_columns(table: Table, headings: Sequence[str], words: Collection[str] = ()) -> Table:
    """Give a table its columns: the first and those named in `words` begin at the left, numbers end at the right."""
    for heading in headings:
        table.add_column(heading, justify="right")
    for column in table.columns:
        if column.header == headings[0] or column.header in words:
            column.justify = "left"
    return table


__all__ = ["clock_time", "grouped", "with_columns", "written"]
