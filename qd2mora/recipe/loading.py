"""From a file to a recipe: read, overridden, checked, its paths anchored."""

import os
from pathlib import Path

from pydantic import ValidationError

from qd2mora.errors import InputRefused
from qd2mora.recipe.problems import dotted, first_problem
from qd2mora.recipe.schema import Recipe
from qd2mora.recipe.yaml_file import apply_override, read_mapping
from qd2mora.redact import secret_in

MAX_TEXT = 4096


def load_recipe(path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> Recipe:
    """Load a recipe file and apply dotted `key=value` overrides.

    Relative paths of base and data are taken beside the recipe where they exist there, else from the working folder.

    Raises InputRefused (one line: file, key, value, what would do).
    """
    path = Path(path)
    content = read_mapping(path)
    for override in overrides:
        if isinstance(content.get("objective"), str):  # a name stands for a section, whose keys may follow
            content["objective"] = {"kind": content["objective"]}
        apply_override(content, override)
    return _anchored(parse_recipe(content, str(path)), path.parent)


def parse_recipe(content: object, where: str = "recipe") -> Recipe:
    """Check a plain mapping. Raises InputRefused."""
    _refuse_texts(content, where, ())
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise InputRefused(f"{where}: {first_problem(error, Recipe)}") from None


def _anchored(recipe: Recipe, folder: Path) -> Recipe:
    def anchor(text: str) -> str:
        text = _at_home(text)
        beside = folder / text
        # os.path: an impossible name (too long, say) is not there, where Path.exists raises.
        if not Path(text).is_absolute() and os.path.exists(beside):
            return str(beside.resolve())
        return text

    tasks = []
    for task in recipe.data.tasks:
        held_out = task.validation
        if isinstance(held_out, str):
            held_out = anchor(held_out)
        tasks.append(task.model_copy(update={"path": anchor(task.path), "validation": held_out}))
    base = recipe.base.model_copy(update={"model": anchor(recipe.base.model), "cache": _at_home(recipe.base.cache)})
    adapter = recipe.adapter
    if adapter.adapters:
        adapter = adapter.model_copy(update={"adapters": [_at_home(each) for each in adapter.adapters]})
    if adapter.start is not None:
        adapter = adapter.model_copy(update={"start": anchor(adapter.start)})
    data = recipe.data.model_copy(update={"tasks": tasks})
    output = _at_home(recipe.output)
    return recipe.model_copy(update={"base": base, "adapter": adapter, "data": data, "output": output})


def _at_home(text: str) -> str:
    """Return a place with `~` as a shell reads it: no shell reads a recipe. A user that is not there is left alone."""
    return os.path.expanduser(text) if text.startswith("~") else text


def _refuse_texts(node: object, where: str, location: tuple[str | int, ...]) -> None:
    """Refuse a text that holds a secret, in a value or a key, or that is too long to be anything here."""
    if isinstance(node, dict):
        for key, child in node.items():
            if isinstance(key, str):
                _refuse_texts(key, where, (*location, "a key"))
            _refuse_texts(child, where, (*location, key))
    elif isinstance(node, list):
        for number, child in enumerate(node):
            _refuse_texts(child, where, (*location, number))
    elif isinstance(node, str):
        if len(node) > MAX_TEXT:
            raise InputRefused(f"{where}: {dotted(location)}: {len(node)} characters (limit {MAX_TEXT})")
        kind = secret_in(node)
        if kind:
            raise InputRefused(
                f"{where}: {dotted(location)} holds {kind}; a recipe holds no secrets, they come from the "
                "environment (HF_TOKEN, WANDB_API_KEY)"
            )


__all__ = ["load_recipe", "parse_recipe"]
