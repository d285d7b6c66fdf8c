"""The house: imports go down the floors, never in a circle; files stay small, nothing unsafe stands in the package."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

from scripts import measure_house

PACKAGE = Path(__file__).parents[1] / "qd2mora"
FILES = sorted(PACKAGE.rglob("*.py"))
FLOORS = {
    "redact": 0,
    "terminal": 0,
    "routed": 0,
    "errors": 1,
    "disk": 2,
    "stopping": 2,
    "recipe": 3,
    "safekeeping": 3,
    "base": 4,
    "data": 5,
    "mixture": 4,
    "memory": 5,
    "adapter_folder": 5,
    "run_folder": 6,
    "objectives": 6,
    "merging": 7,
    "evaluation": 7,
    "inspection": 7,
    "training": 8,
    "composition": 8,
    "report": 8,
    "serving": 8,
    "publishing": 8,
    "comparison": 9,
    "cli": 10,
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


UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "code", "runpy"}
UNSAFE_CALLS = {
    *("eval", "exec", "compile", "__import__", "torch.load", "torch.save", "torch.hub.load"),
    *("os.system", "os.popen", "pandas.read_pickle", "numpy.load", "np.load", "safe_load_all", "torch.jit.load"),
    *("yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.UnsafeLoader", "yaml.FullLoader", "yaml.Loader"),
    "yaml.load",
}


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def unsafe(tree: ast.AST) -> list[str]:
    """Return what in a module could run what it reads: imports, names whether called or passed on, and keywords."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in UNSAFE_MODULES]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names = {f"{module}.{alias.name}" for alias in node.names}
            found += [module] if module.split(".")[0] in UNSAFE_MODULES else sorted(names & UNSAFE_CALLS)
        elif isinstance(node, ast.Name | ast.Attribute) and dotted(node) in UNSAFE_CALLS:
            found.append(dotted(node))
        elif isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "shell", "allow_pickle"):
            found += [] if isinstance(node.value, ast.Constant) and node.value.value is False else [node.arg]
        elif isinstance(node, ast.keyword) and node.arg in ("weights_only", "use_safetensors"):
            found += [] if isinstance(node.value, ast.Constant) and node.value.value is True else [node.arg]
    return found


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "run = eval",
        "exec('x')",
        "import yaml\nyaml.load(x)",
        "f(trust_remote_code=asked)",
        "run(x, shell=True)",
        "f(weights_only=False)",
    ],
)
def test_the_check_for_unsafe_code_finds_it(line: str) -> None:
    assert unsafe(ast.parse(line))
    assert not unsafe(ast.parse("model.eval()\nf(trust_remote_code=False)\nsafetensors.load(x)\nre.compile(x)"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_the_floors_only(path: Path) -> None:
    part = part_of(path)
    if part in ("__init__", "__main__"):
        return
    for other in imported_parts(path) - {part}:
        assert FLOORS[other] < FLOORS[part], f"{part} imports {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_is_short_says_what_it_is_for_and_does_nothing_unsafe(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    assert ast.get_docstring(ast.parse(text))
    assert not unsafe(ast.parse(text))
    assert not re.search(r"util|helper|manager|misc", path.name)
    # A reward file is the user's own code, which may raise anything.
    assert "except Exception" not in text or path == PACKAGE / "objectives" / "rules.py"


def test_no_files_import_each_other_in_a_circle() -> None:
    modules = measure_house.modules_of(PACKAGE, "qd2mora")
    assert measure_house.circles(measure_house.imports_of(modules)) == []


def test_the_check_for_circles_finds_deferred_ones_and_those_under_type_checking(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "__init__.py").write_text("from house.part.one import first\n")
    (tmp_path / "part" / "one.py").write_text("def first():\n    from house.two import second\n    return second\n")
    (tmp_path / "two.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from house.part import first\nsecond = 2\n"
    )
    (tmp_path / "three.py").write_text("from house.two import second\n")
    found = measure_house.circles(measure_house.imports_of(measure_house.modules_of(tmp_path, "house")))
    assert found == [["house.part", "house.part.one", "house.two"]]


def test_few_modules_lie_loose_at_the_root() -> None:
    assert len([path for path in FILES if path.parent == PACKAGE]) <= 8


def test_every_part_is_installed() -> None:
    settings = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))
    folders = {path.parent for path in FILES}
    names = {".".join(path.relative_to(PACKAGE.parent).parts) for path in folders}
    assert set(settings["tool"]["setuptools"]["packages"]) == names | {"qd2mora.recipes"}


def test_every_part_has_a_floor() -> None:
    assert {part_of(path) for path in FILES} - {"__init__", "__main__"} == set(FLOORS)


def test_the_page_on_architecture_names_files_that_are_there_and_every_part() -> None:
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w/]+(?:\.py|/))`", text))
    known = {path.relative_to(PACKAGE).as_posix() for path in FILES} | {path.name for path in FILES}
    tests = {path.relative_to(PACKAGE.parent).as_posix() for path in (PACKAGE.parent / "tests").rglob("*.py")}
    folders = {f"{path.parent.relative_to(PACKAGE.parent).as_posix()}/" for path in map(PACKAGE.parent.joinpath, tests)}
    parts = {f"{part}.py" if (PACKAGE / f"{part}.py").is_file() else f"{part}/" for part in FLOORS}
    assert named - known - tests - folders - parts - {"scripts/measure_house.py"} == set()
    assert parts - named == set()


def test_the_page_on_architecture_gives_each_part_its_floor() -> None:
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| `(\w+)(?:\.py|/)` \|", text, re.MULTILINE)
    assert {part: int(floor) for floor, part in rows} == FLOORS
