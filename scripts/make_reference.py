"""Make docs/recipe.md, every key of a recipe, from the schema.

python scripts/make_reference.py           # write it; a test fails where it is not up to date
python scripts/make_reference.py --check   # exit code 1 where it is not
"""

import argparse
import ast
import inspect
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from qd2mora.recipe import Recipe

PAGE = Path(__file__).parents[1] / "docs" / "recipe.md"
HEAD = """# Every key of a recipe

Made by `python scripts/make_reference.py` from `qd2mora/recipe/`; a test keeps it up to date. Any key can be set on the
command line too: `qd2mora train my.yaml train.steps=100 data.tasks.0.limit=500`. A key with no default must be given.
Keys of `adapter` that are left out take the method's own values (`qd2mora methods NAME`).
"""
UNION = "anyOf"


def main() -> None:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    made = reference()
    if parser.parse_args().check:
        sys.exit(PAGE.read_text(encoding="utf-8") != made)
    PAGE.write_text(made, encoding="utf-8")


def reference() -> str:
    """Return the page."""
    definitions = Recipe.model_json_schema()["$defs"]
    parts = [HEAD]
    for place, model in sections(Recipe):
        about = " ".join((inspect.cleandoc(model.__doc__ or "")).split())
        parts += [f"\n## {place}\n" if place else "\n## The whole\n", f"{about}\n"]
        parts += ["| key | value | default | |", "| --- | --- | --- | --- |"]
        properties = model.model_json_schema(ref_template="{model}").get("properties", {})
        for name, words in described(model).items():
            cells = (f"`{name}`", value_of(properties[name], definitions), default_of(model, name), words)
            parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(parts) + "\n"


def sections(model: type[BaseModel], place: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield every section with its place in a recipe."""
    yield place, model
    for name, field in model.model_fields.items():
        for part in _models_in(field.annotation):
            inside = {"tasks": "[]", "stages": "[]", "gates": ".ROLE"}.get(name, "")
            yield from sections(part, f"{place}.{name}{inside}".lstrip("."))


def described(model: type[BaseModel]) -> dict[str, str]:
    """Return each key of a section with what stands below it in the source. Raises LookupError where nothing does."""
    found = {name: field.description or "" for name, field in model.model_fields.items()}
    if not all(found.values()):
        (source,) = ast.parse(textwrap.dedent(inspect.getsource(model))).body
        assert isinstance(source, ast.ClassDef)
        for place, node in enumerate(source.body[:-1]):
            below = source.body[place + 1]
            is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and is_text:
                found[node.target.id] = " ".join(str(below.value.value).split())  # type: ignore[attr-defined]
    for name, field in model.model_fields.items():
        nested = _models_in(field.annotation)
        if not found[name] and nested:
            found[name] = "see below"
    missing = [name for name, words in found.items() if not words]
    if missing:
        raise LookupError(f"{model.__name__} says nothing of {', '.join(missing)}")
    return found


def value_of(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    """Say in words what a key takes."""
    if UNION in schema:
        parts = [value_of(each, definitions) for each in schema[UNION] if each.get("type") != "null"]
        return " or ".join(dict.fromkeys(parts))
    if "$ref" in schema or "allOf" in schema:
        return "a section"
    if "enum" in schema:
        return ", ".join(f"`{each}`" for each in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    kind = schema.get("type")
    if kind == "array":
        return f"list of: {value_of(schema['items'], definitions)}"
    if kind == "object":
        return f"names, each with: {value_of(schema['additionalProperties'], definitions)}"
    if kind in ("integer", "number"):
        return f"{'whole number' if kind == 'integer' else 'number'}{_range(schema)}"
    return {"boolean": "`true`, `false`", "string": "text"}[str(kind)]


def _range(schema: dict[str, Any]) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    parts = []
    if low is not None:
        parts.append(f"from {low:,}" if isinstance(low, int) else f"from {low:g}")
    elif "exclusiveMinimum" in schema:
        parts.append(f"above {schema['exclusiveMinimum']:g}")
    if high is not None:
        parts.append(f"to {high:,}" if isinstance(high, int) else f"to {high:g}")
    elif "exclusiveMaximum" in schema:
        parts.append(f"below {schema['exclusiveMaximum']:,}")
    return f" {' '.join(parts)}" if parts else ""


def default_of(model: type[BaseModel], name: str) -> str:
    """Return the default as YAML has it; nothing where there is none or it is left open."""
    field = model.model_fields[name]
    if field.is_required() or field.default is None or isinstance(field.default, BaseModel):
        return "" if not field.is_required() else "(must be given)"
    if isinstance(field.default, bool):
        return f"`{str(field.default).lower()}`"
    return f"`{field.default}`"


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [part for each in get_args(annotation) for part in _models_in(each)]


if __name__ == "__main__":
    main()
