"""How does the house look? Circles, long functions, loose modules and more, of any checkout, by its syntax trees.

    python scripts/measure_house.py                      # this checkout
    python scripts/measure_house.py ../other --package peft --source src/peft
    python scripts/measure_house.py --step               # also: files that a training step runs through

Imports are counted wherever they stand: deferred into functions and under TYPE_CHECKING too. `from part import name`
leads to the part's face (`__init__`) and to the file behind it that the face takes the name from. Classes imported by a
face under another name are not followed. One JSON line last.
"""

import argparse
import ast
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

Imports = dict[str, set[str]]
"""Module to the modules of the same package that it imports."""


@dataclass
class Counts:
    """What one package's files add up to."""

    files: int = 0
    lines: int = 0
    comments: int = 0
    any_uses: int = 0
    conditional_expressions: int = 0
    functions: list[tuple[int, int, str]] = field(default_factory=list)
    """Lines, parameters and name of each."""


def modules_of(source: Path, package: str) -> dict[str, Path]:
    """Return the files of a package by their dotted name."""
    found = {}
    for path in sorted(source.rglob("*.py")):
        parts = [package, *path.relative_to(source).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(modules: dict[str, Path]) -> Imports:
    """Return who imports whom: a face (`__init__`), and the file behind it that has what is taken."""
    taken = {name: _taken(name, ast.parse(path.read_text(encoding="utf-8")), modules) for name, path in modules.items()}
    faces = {
        name: {word: module for module, word in taken[name] if word}
        for name, path in modules.items()
        if path.name == "__init__.py"
    }
    return {
        name: {other for module, word in taken[name] for other in _behind(module, word, faces)} - {name}
        for name in modules
    }


def circles(imports: Imports) -> list[list[str]]:
    """Return the groups of modules that import each other in a circle (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(imports[name]):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            place = stack.index(name)
            group = sorted(stack[place:])
            del stack[place:]
            if len(group) > 1:
                found.append(group)

    sys.setrecursionlimit(10_000)
    for name in imports:
        if name not in index:
            visit(name)
    return sorted(found, key=len, reverse=True)


def count(modules: dict[str, Path]) -> Counts:
    """Return what all files hold."""
    found = Counts()
    for path in modules.values():
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        found.files += 1
        found.lines += len(lines)
        found.comments += sum(line.lstrip().startswith("#") for line in lines)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.IfExp):
                found.conditional_expressions += 1
            elif isinstance(node, ast.Name) and node.id == "Any":
                found.any_uses += 1
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                found.functions.append((length, _parameters(node), f"{path.name}:{node.name}"))
    return found


def files_of_a_step(checkout: Path) -> dict[str, list[str]]:
    """Train three steps of the quickstart and return the files that the second ran through, by kind of thread."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", _TRACED, str(checkout), folder]
        ended = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True)
    return dict(json.loads(ended.stdout.splitlines()[-1]))


_TRACED = """
import json, sys, threading
checkout, folder = sys.argv[1:]
sys.path.insert(0, checkout)
from pathlib import Path
from qd2mora import load_recipe, train
from qd2mora.training import loop
seen, depth = {"main": set(), "other": set()}, 0
package = str(Path(checkout).resolve() / "qd2mora")
def watch(frame, event, argument):
    name = frame.f_code.co_filename
    if event == "call" and depth and name.startswith(package):
        is_main = threading.current_thread() is threading.main_thread()
        seen["main" if is_main else "other"].add(name[len(package) + 1:])
steps = [name for name in ("_step", "step") if hasattr(loop.Training, name)][0]
whole = getattr(loop.Training, steps)
number = 0
def stepped(self):
    global depth, number
    number += 1
    depth = int(number == 2)
    try:
        return whole(self)
    finally:
        depth = 0
setattr(loop.Training, steps, stepped)
recipe = load_recipe(
    Path(checkout) / "recipes" / "quickstart.yaml",
    [f"output={folder}/run", "train.steps=3", "finish.export=false", "finish.score=false", "train.save_every=1"],
)
sys.setprofile(watch)
threading.setprofile(watch)
train(recipe)
sys.setprofile(None)
print(json.dumps({kind: sorted(names) for kind, names in seen.items()}))
"""


def _parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    arguments = node.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return len([each for each in named if each.arg not in ("self", "cls")])


def _taken(name: str, tree: ast.AST, modules: dict[str, Path]) -> list[tuple[str, str]]:
    """Return what a module takes from others of its package: their names, and the word that is taken ('' for all)."""
    is_face = modules[name].name == "__init__.py"
    taken = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            taken += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = name.split(".")
            home = parts[: len(parts) - node.level + is_face] if node.level else []
            module = ".".join([*home, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                taken.append((inner, "") if inner in modules else (module, alias.name))
    return [(module, word) for module, word in taken if module in modules]


def _behind(module: str, word: str, faces: dict[str, dict[str, str]]) -> list[str]:
    """Return a module, and where it is a face that hands the word on, those behind it."""
    on_the_way = [module]
    while word in faces.get(module, {}) and faces[module][word] not in on_the_way:
        module = faces[module][word]
        on_the_way.append(module)
    return on_the_way


def _table(name: str, source: Path, package: str) -> dict[str, object]:
    modules = modules_of(source, package)
    found, groups = count(modules), circles(imports_of(modules))
    longest, most = max(found.functions), max(found.functions, key=lambda each: each[1])
    thousands = found.lines / 1000
    return {
        "house": name,
        "files": found.files,
        "lines": found.lines,
        "circles": [len(group) for group in groups],
        "in a circle": [[module.removeprefix(f"{package}.") for module in group] for group in groups[:3]],
        "modules at the root": sum(path.parent == source for path in modules.values()),
        "functions": len(found.functions),
        "functions over 40 lines": sum(lines > 40 for lines, _, _ in found.functions),
        "longest function": f"{longest[2]} {longest[0]}",
        "functions over 7 parameters": sum(number > 7 for _, number, _ in found.functions),
        "most parameters": f"{most[2]} {most[1]}",
        "Any per 1,000 lines": round(found.any_uses / thousands, 1),
        "conditional expressions per 1,000 lines": round(found.conditional_expressions / thousands, 1),
        "full-line comments, share": round(found.comments / found.lines, 4),
    }


def main() -> None:
    """Print one line a measure, and all as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", nargs="?", type=Path, default=Path(__file__).resolve().parents[1])
    parser.add_argument("--package", default="qd2mora")
    parser.add_argument("--source", help="folder of the package inside the checkout; its name where left out")
    parser.add_argument("--step", action="store_true")
    asked = parser.parse_args()
    table = _table(asked.checkout.resolve().name, asked.checkout / (asked.source or asked.package), asked.package)
    if asked.step:
        for thread, names in files_of_a_step(asked.checkout.resolve()).items():
            table[f"files of a step, {thread} thread"] = len(names)
            table[f"files of a step, {thread} thread, by name"] = names
    for measure, value in table.items():
        print(f"{measure:>45}  {value}")
    print(json.dumps(table))


if __name__ == "__main__":
    main()
