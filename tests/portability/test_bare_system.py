"""WIN: every module loads, and disk, locks and chat templates work, on a system without what Windows lacks."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "qd2mora"
OF_LINUX = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "select", "syslog"}


def test_every_module_loads_and_writes_where_windows_lacks_what_linux_has(tmp_path: Path) -> None:
    program = [sys.executable, str(Path(__file__).with_name("bare_system.py")), str(tmp_path)]
    ended = subprocess.run(
        program, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr
    there = ended.stdout.split()
    assert len(there) > len(list(PACKAGE.rglob("*.py"))) - 6
    assert {"qd2mora.disk.lock", "qd2mora.data.chat_template", "qd2mora.training.run", "qd2mora.cli"} <= set(there)


def modules_of_linux(tree: ast.Module) -> list[str]:
    """Return what a module imports that Windows lacks, but for what it tries and does without."""
    tried = {id(each) for node in ast.walk(tree) if isinstance(node, ast.Try) for each in node.body}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and id(node) not in tried:
            found += [alias.name for alias in node.names if alias.name in OF_LINUX]
        elif isinstance(node, ast.ImportFrom) and node.module in OF_LINUX:
            found.append(node.module)
        elif isinstance(node, ast.Attribute) and node.attr == "SIGKILL":
            found.append(node.attr)
    return found


def text_files_without_encoding(tree: ast.Module) -> list[int]:
    """Return lines that read or write text in whatever the system thinks text is; on Windows that is not UTF-8."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            has_encoding = any(keyword.arg == "encoding" for keyword in node.keywords)
            if name in ("read_text", "write_text") and not has_encoding:
                found.append(node.lineno)
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_needs_nothing_of_linux_and_reads_text_as_utf_8(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert modules_of_linux(tree) == [] and text_files_without_encoding(tree) == []


def test_the_check_finds_what_it_looks_for() -> None:
    tree = ast.parse(
        "import fcntl\ntry:\n    import resource\nexcept ModuleNotFoundError:\n    pass\np.read_text()\ns.SIGKILL"
    )
    assert modules_of_linux(tree) == ["fcntl", "SIGKILL"] and text_files_without_encoding(tree) == [6]
