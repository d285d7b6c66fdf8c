"""NB1: numbers at and beyond the edge of what machines count with, in every numeric key of the recipe."""

from pathlib import Path
from typing import Any

import yaml
from forked import Result
from printed import Printed, run_on
from pydantic import BaseModel

from qd2mora.errors import SignalStop
from qd2mora.recipe import Recipe

INTEGERS = (-1, 0, 1, 2**12, 2**20, 2**20 + 1, 10**9, 2**32, 2**63, 2**64, 10**30, 10**400)
FLOATS = (-1.0, 0.0, 5e-324, 1e-40, 1e-30, 1e-6, 1e6, 1e30, 3.5e38, 1.7e308)
WORK = ("rank", "ranks.0", "experts", "steps", "epochs", "global_batch", "micro_batch", "width", "external_width")
"""Keys whose large numbers are honest work, which only a plan is made of."""
MOST_WORK = 64


TELLING: list[tuple[str, int | float | str]] = [
    ("train.seed", 2**32),
    ("adapter.alpha", 1.7e308),
    ("train.epochs", 1.7e308),
    ("train.epochs", 5e-324),
    ("adapter.rank", 2**63),
    ("train.steps", 10**400),
]
"""What once gave a traceback, asked in every size."""
NINES = "9" * 400
TEXTS = {
    "memory.budget": (f"{NINES}GiB", f"1.{NINES}GiB", "0GiB", "999999999999GB"),
    "train.time_limit": (f"{NINES}h", "0.0000001s"),
    "adapter.allocation": (NINES, f"2-{NINES}", "2-99999999999", "0-2", "8-2"),
}
"""Texts that hold numbers."""


def numeric_keys(model: type[BaseModel] = Recipe, prefix: str = "") -> dict[str, bool]:
    """Return every key that takes a number, dotted as overrides are, and whether it takes a fraction."""
    found: dict[str, bool] = {}
    for name, field in model.model_fields.items():
        for part in _parts(field.annotation):
            if isinstance(part, type) and issubclass(part, BaseModel):
                found |= numeric_keys(part, f"{prefix}{name}{_inside(name)}.")
            elif part in (int, float):
                found[f"{prefix}{name}{_inside(name)}"] = part is float
    return found


def _inside(name: str) -> str:
    """Name one entry of what is a list or a mapping."""
    return {"tasks": ".0", "gates": ".down", "penalties": ".orthogonality", "ranks": ".0"}.get(name, "")


def _parts(annotation: Any) -> list[Any]:
    arguments = getattr(annotation, "__args__", ())
    if not arguments:
        return [annotation]
    return [part for argument in arguments for part in _parts(argument)]


def cases(step: int) -> list[tuple[str, int | float | str]]:
    """Return every `step`-th pair of a key and a number."""
    keys = numeric_keys()
    pairs: list[tuple[str, int | float | str]] = [
        (key, number) for key, is_float in keys.items() for number in INTEGERS + (FLOATS if is_float else ())
    ]
    texts = [(key, text) for key, several in TEXTS.items() for text in several]
    return TELLING + pairs[::step] + texts[:: max(1, step // 10)]


def gate(made: Path, folder: Path, step: int) -> Result:
    """Plan, and where that went well train, with each number: done, or one line and an exit code of ours."""
    result = Result("NB1")
    for key, number in cases(step):
        arguments = _arguments(made / "recipe.yaml", folder, key, number)
        for verb in ("plan", "train"):
            printed = run_on(verb, *arguments, *(["--overwrite"] if verb == "train" else []))
            result.check(_is_answered(printed), f"{verb} {key}={number}: {printed}")
            if printed.code != 0 or (key.endswith(WORK) and isinstance(number, int | float) and number > MOST_WORK):
                break
    return result


def _arguments(recipe: Path, folder: Path, key: str, number: int | float | str) -> list[str]:
    written = yaml.safe_dump(number).removesuffix("\n...\n").strip()
    more = [] if key == "train.steps" else ["train.steps=2"]
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    return [str(recipe), f"output={folder / 'run'}", *more, *_around(key, content), f"{key}={written}"]


def _around(key: str, content: dict[str, Any]) -> list[str]:
    """Return what else a key needs to be read at all."""
    if key == "train.epochs":
        return ["train.steps=null"]
    if key == "adapter.ranks.0":
        return ["adapter.method=loramoe", "adapter.rank=null", "adapter.ranks=[4, 4]", "adapter.up=null"]
    if key.startswith("adapter.shared.") and not key.endswith("rank"):
        return ["adapter.shared.rank=2"]
    if key == "data.tasks.0.weight":
        return ["data.tasks.1.weight=1.0"]
    return []


def _is_answered(printed: Printed) -> bool:
    if printed.code == 0:
        return "Traceback" not in printed.err
    is_line = printed.err.startswith("error: ") and printed.err.count("\n") == 1 and len(printed.err) < 1000
    is_told = printed.code == 3 and not printed.err  # `plan` tells of what does not fit on standard output
    is_stopped = (
        printed.code == SignalStop.exit_code and "Traceback" not in printed.err
    )  # its time was over, as it was asked for
    return is_told or is_stopped or (printed.code in (2, 3, 4, 5) and is_line)


__all__ = ["cases", "gate", "numeric_keys"]
