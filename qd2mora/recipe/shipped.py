"""Recipes that come along: where they lie, and their text, which runs anywhere."""

import re
from pathlib import Path


def shipped_recipes() -> dict[str, Path]:
    """Return the recipes that come with the package, by name."""
    # Inside the package where it is installed, beside it in a source tree.
    package = Path(__file__).parents[1]
    folder = next(place for place in (package / "recipes", package.parent / "recipes") if place.is_dir())
    return {path.stem: path for path in folder.glob("*.yaml")}


def copied_recipe(path: Path) -> str:
    """Return the text of a recipe that comes along, with the files that come along named so that it runs anywhere."""
    text = path.read_text(encoding="utf-8")
    for name in (each.name for each in path.parent.iterdir() if each.is_dir() and any(each.glob("*/*.json*"))):
        text = re.sub(rf"(?<=: ){re.escape(name)}/", f"{path.parent.resolve()}/{name}/", text)
    return text


__all__ = ["copied_recipe", "shipped_recipes"]
