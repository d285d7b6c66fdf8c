"""A neighbour's training file as a recipe: its keys by a table, and a list of all that has no place here.

Each neighbour is one small file with its table (`axolotl`, `llama_factory`); what it leaves out takes the neighbour's
own default where that differs from ours.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qd2mora.errors import InputRefused
from qd2mora.recipe.loading import parse_recipe

Value = Any
"""What stands in somebody else's YAML."""
Read = Callable[[Value], Value]


class NoCounterpart(ValueError):  # noqa: N818 - reads as the sentence it is
    """A value that nothing here does; its words say why."""


@dataclass(frozen=True)
class Key:
    """What a neighbour's key is called here, dotted, and how its value is read."""

    ours: str
    read: Read = lambda value: value


@dataclass
class Sources:
    """A neighbour's data as tasks of ours; `used`: keys that are answered by them; `left`: what could not be."""

    tasks: list[dict[str, Value]] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    left: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Neighbour:
    """A neighbour's keys; `reasons`: why some have no place here; `defaults`: its own, where ours are others.

    batch: its names for rows of a micro batch and for their number in a step. sources: reads its data, given the whole
    file and the folder it lies in.
    """

    keys: Mapping[str, Key]
    reasons: Mapping[str, str]
    defaults: Mapping[str, Value]
    batch: tuple[str, str]
    sources: Callable[[Mapping[str, Value], Path], Sources]


@dataclass
class Translation:
    """A recipe's content, and a line for each thing that is not in it."""

    content: dict[str, Value]
    left: list[str]


ORDER = ("base", "adapter", "data", "train", "memory", "output")


def translate(neighbour: Neighbour, given: Mapping[str, Value], folder: Path) -> Translation:
    """Translate a neighbour's file. Raises InputRefused where a secret is in it."""
    sources = neighbour.sources(given, folder)
    content: dict[str, Value] = {"data": {"tasks": sources.tasks}}
    left = sources.left
    for name, value in (dict(neighbour.defaults) | dict(given)).items():
        if value is None or name in sources.used or name in neighbour.batch:
            continue
        key = neighbour.keys.get(name)
        if key is None:
            left.append(f"{name}: {value} ({neighbour.reasons.get(name, 'nothing here is called so')})")
            continue
        try:
            _set(content, key.ours, key.read(value))
        except (ValueError, TypeError, OverflowError) as error:
            left.append(f"{name}: {value} ({error})")
    try:
        _set_batch(content, neighbour, given)
    except (ValueError, TypeError, OverflowError) as error:
        left.append(f"{' and '.join(neighbour.batch)}: {error}")
    _settle_length(content)
    content = {section: content[section] for section in ORDER if section in content}
    return Translation(content, left + _still_wrong(content))


def _set(content: dict[str, Value], place: str, value: Value) -> None:
    *sections, name = place.split(".")
    for section in sections:
        content = content.setdefault(section, {})
    content[name] = value


def _set_batch(content: dict[str, Value], neighbour: Neighbour, given: Mapping[str, Value]) -> None:
    """Rows of a step are those of a micro batch times their number; a neighbour has both for each GPU."""
    rows, number = (whole(given.get(name, neighbour.defaults.get(name, 1))) for name in neighbour.batch)
    _set(content, "train.micro_batch", rows)
    _set(content, "train.global_batch", rows * number)


def _settle_length(content: dict[str, Value]) -> None:
    """Where a neighbour's file gives both, its steps decide."""
    train = content.get("train", {})
    if "steps" in train:
        train.pop("epochs", None)


def _still_wrong(content: dict[str, Value]) -> list[str]:
    try:
        parse_recipe(content, "the recipe")
    except InputRefused as error:
        if "holds no secrets" in str(error):
            raise
        return [f"still to do: {error}"]
    return []


def whole(value: Value) -> int:
    """Read a whole number. Raises NoCounterpart."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise NoCounterpart("a whole number is meant")
    return int(value)


def number(value: Value) -> float:
    """Read a number. Raises NoCounterpart."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise NoCounterpart("a number is meant")
    return float(value)


def flag(value: Value) -> bool:
    """Read true or false. Raises NoCounterpart."""
    if not isinstance(value, bool):
        raise NoCounterpart("true or false is meant")
    return value


def unlike(value: Value) -> bool:
    """Read a flag that is called by its opposite here."""
    return not flag(value)


def one_of(words: Mapping[str, Value], reason: str = "nothing here does that") -> Read:
    """Return a reader of words, each with what it is here."""

    def read(value: Value) -> Value:
        name = str(value).lower()
        if name not in words:
            raise NoCounterpart(f"{reason}; there are {', '.join(words)}")
        return words[name]

    return read


def only_if(wanted: bool, ours: Value, reason: str) -> Read:
    """Return a reader of a flag that means `ours` where it is as wanted."""

    def read(value: Value) -> Value:
        if flag(value) is not wanted:
            raise NoCounterpart(reason)
        return ours

    return read


def names(value: Value) -> list[str]:
    """Read a list of names, or names with commas."""
    if isinstance(value, str):
        return [name.strip() for name in value.split(",") if name.strip()]
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise NoCounterpart("names are meant")
    return value


def task_name(text: str, taken: list[dict[str, Value]]) -> str:
    """Return a name for a task, made of a path's last part, that no other has."""
    stem = text.rstrip("/").rpartition("/")[2]
    for ending in (".json", ".jsonl", ".csv", ".parquet", ".arrow"):
        stem = stem.removesuffix(ending)
    name = "".join(each if each.isascii() and (each.isalnum() or each in "_.-") else "_" for each in stem).lstrip("_.-")
    name, others = name or "task", {task["name"] for task in taken}
    if name not in others:
        return name
    return next(f"{name}-{place}" for place in range(2, len(taken) + 3) if f"{name}-{place}" not in others)


__all__ = [
    *("Key", "Neighbour", "NoCounterpart", "Sources", "Translation", "Value"),
    *("flag", "names", "number", "one_of", "only_if", "task_name", "translate", "unlike", "whole"),
]
