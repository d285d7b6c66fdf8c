"""A file of arms: names of one's own, each a method with settings of the adapter and of training.

    narrow: {method: d2mora, down: {experts: 2}, up: {experts: 2}}
    beside: {method: hydralora, up: {experts: 3}, shared: {part: 0.5}}
    lora-plus: {method: lora, train: {rates: {up: 16}}}

An arm has the keys of a recipe's adapter, and: `scale`, what its update is multiplied with (the method's own where left
out); `shared.part`, the part of the trained parameters that the shared expert gets; `train`, keys of a recipe's train
that differ for this arm. Its rank is solved for, unless it says one.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qd2mora.errors import InputRefused, nearest
from qd2mora.mixture.presets import find_method
from qd2mora.recipe import Adapter, Recipe
from qd2mora.recipe.problems import first_problem
from qd2mora.recipe.train import Train
from qd2mora.recipe.yaml_file import read_mapping

NOT_OF_AN_ARM = ("start", "grow", "adapters", "alpha")
OF_TRAINING = ("optimizer", "rates", "routing", "weight_decay", "warmup_steps", "schedule", "max_grad_norm")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)


@dataclass(frozen=True)
class Wish:
    """An arm as it is asked for: keys of the adapter that are given, and what is not the adapter's."""

    method: str
    given: dict[str, Any] = field(default_factory=dict)
    scale: float | None = None
    shared_part: float | None = None
    train: dict[str, Any] = field(default_factory=dict)


def read_arms(path: Path, recipe: Recipe) -> dict[str, Wish]:
    """Return the arms of a file by name, in its order. Raises InputRefused with file, arm and key."""
    arms: dict[str, Wish] = {}
    for name, content in read_mapping(path, "--arms").items():
        where = f"{path}: {name}"
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise InputRefused(f"{where} will not do: an arm's name is letters, digits, dots, - and _, at most 64")
        if not isinstance(content, dict):
            raise InputRefused(f"{where}: {content} will not do: write {{method: d2mora, up: {{experts: 2}}}}")
        arms[name] = _wish(where, dict(content), recipe)
    if not arms:
        raise InputRefused(f"{path}: names no arm")
    return arms


def _wish(where: str, content: dict[str, Any], recipe: Recipe) -> Wish:
    scale = _number(where, "scale", content.pop("scale", None), above=0, below=float("inf"))
    train, part = content.pop("train", {}), None
    if isinstance(content.get("shared"), dict) and "part" in content["shared"]:
        shared = dict(content["shared"])
        part = _number(where, "shared.part", shared.pop("part"), above=0, below=1)
        if "rank" in shared:
            raise InputRefused(f"{where}.shared: give its rank or its part of the parameters, not both")
        content["shared"] = shared | {"rank": 1}
    for key in NOT_OF_AN_ARM:
        if key in content:
            there = "scale, what the update is multiplied with" if key == "alpha" else "an arm starts from nothing"
            raise InputRefused(f"{where}.{key}: not of an arm; {there}")
    try:
        adapter = Adapter.model_validate(content)
        find_method(adapter.method)
    except ValidationError as error:
        raise InputRefused(f"{where}: {first_problem(error, Adapter)}") from None
    except InputRefused as error:
        raise InputRefused(f"{where}: {error}") from None
    given = {key: getattr(adapter, key) for key in adapter.model_fields_set - {"method"}}
    return Wish(adapter.method, given, scale, part, _training(where, train, recipe))


def _training(where: str, train: object, recipe: Recipe) -> dict[str, Any]:
    """Return the settings of training that are given, checked."""
    if not isinstance(train, dict):
        raise InputRefused(f"{where}.train: {train} will not do: write {{rates: {{up: 16}}}}")
    for key in train:
        if key not in OF_TRAINING:
            raise InputRefused(f"{where}.train: '{key}' is the same for all arms; {nearest(str(key), OF_TRAINING)}")
    try:
        checked = Train.model_validate(recipe.train.model_dump() | train)
    except ValidationError as error:
        raise InputRefused(f"{where}.train: {first_problem(error, Train)}") from None
    return {key: getattr(checked, key) for key in train}


def _number(where: str, key: str, value: object, *, above: float, below: float) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not above < value < below:
        limit = "" if below == float("inf") else f" and below {below:g}"
        raise InputRefused(f"{where}.{key}: {value} will not do: a number above {above:g}{limit}")
    return float(value)


def wish_of(name: str, arms: Mapping[str, Wish]) -> Wish:
    """Return the arm of a name: the file's, or a method's own. Raises InputRefused."""
    if name in arms:
        return arms[name]
    try:
        return Wish(find_method(name).name)
    except InputRefused:
        if arms:
            raise InputRefused(f"--methods: no method, and no arm of --arms, '{name}'") from None
        raise


__all__ = ["Wish", "read_arms", "wish_of"]
