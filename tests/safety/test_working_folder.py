"""What lies in the working folder is data: `python -m qd2mora` and the console script take no module from there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = (
    "json",
    "torch",
    "yaml",
    "typing",
    "sitecustomize",
    "usercustomize",
    "transformers",
    "peft",
    "numpy",
    "typer",
)
CONSOLE = "import sys; from qd2mora.cli import main; sys.argv = ['qd2mora', *sys.argv[1:]]; main()"


@pytest.mark.parametrize("form", ["module", pytest.param("script", marks=pytest.mark.long)])
def test_no_module_is_taken_from_the_working_folder(form: str, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    for name in MODULES:
        (work / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r})\n", encoding="utf-8")
    (work / "megatron").mkdir()
    script = tmp_path / "bin" / "qd2mora"
    script.parent.mkdir()
    script.write_text(CONSOLE, encoding="utf-8")
    start = ["-m", "qd2mora"] if form == "module" else [str(script)]
    command = [sys.executable, *start, "plan", str(ROOT / "recipes/quickstart.yaml"), "--no-time"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)
    assert not (tmp_path / "ran").exists(), (tmp_path / "ran").read_text()
    assert ended.stderr == "" or ended.stderr.startswith("error: ")
    assert ended.returncode in (0, 2)
