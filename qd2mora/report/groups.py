"""Groups of what is alike, and how a number that may be missing is written."""

from collections.abc import Callable, Iterable
from typing import TypeVar

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


__all__ = ["grouped", "written"]
