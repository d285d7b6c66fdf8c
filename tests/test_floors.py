"""The house: imports go down the floors only, files stay small, nothing unsafe stands in the package."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "qd2mora"
FILES = sorted(PACKAGE.rglob("*.py"))
FLOORS = {
    "errors": 0,
    "stopping": 0,
    "durable": 0,
    "sealed": 0,
    "recipe": 0,
    "recipe_file": 0,
    "mixture": 1,
    "base": 1,
    "data": 1,
    "memory": 2,
    "adapter_folder": 2,
    "run_folder": 2,
    "merging": 3,
    "evaluation": 3,
    "training": 4,
    "report": 4,
    "cli": 5,
}
SAME_FLOOR = {("recipe", "errors"), ("recipe", "recipe_file"), ("recipe_file", "errors")} | {
    ("stopping", "errors"),
    ("sealed", "errors"),
    ("sealed", "durable"),
    ("run_folder", "adapter_folder"),
}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("qd2mora."):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("qd2mora.")}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_the_floors_only(path: Path) -> None:
    part = part_of(path)
    if part == "__init__":
        return
    for other in imported_parts(path) - {part}:
        assert FLOORS[other] < FLOORS[part] or (part, other) in SAME_FLOOR, f"{part} imports {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_is_short_says_what_it_is_for_and_does_nothing_unsafe(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    assert ast.get_docstring(ast.parse(text))
    assert not re.search(r"\bpickle\b|torch\.load\(|yaml\.load\(|(?<!\.)\beval\(|\bexec\(|trust_remote_code=True", text)
    assert not re.search(r"util|helper|manager|misc", path.name)
    assert "except Exception" not in text


def test_every_part_is_installed() -> None:
    settings = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))
    folders = {path.parent for path in FILES}
    names = {".".join(path.relative_to(PACKAGE.parent).parts) for path in folders}
    assert set(settings["tool"]["setuptools"]["packages"]) == names | {"qd2mora.recipes"}


def test_every_part_has_a_floor() -> None:
    assert {part_of(path) for path in FILES} - {"__init__"} == set(FLOORS)
