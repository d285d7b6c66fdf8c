"""Do hostile or damaged inputs end in one clear line, and does each guard matter?

    python scripts/gates_input.py                # every gate in its long size, then every mutant; about 15 minutes
    python scripts/gates_input.py --only P1 V1   # some gates; --quick: in the size of the mutants
    python scripts/gates_input.py --no-mutants   # or --no-gates

Each mutant is an edit of a guarded line in a copy of the source tree, on which the quick gate must fail. What ran whole
goes to `scripts/results/gates_input.json` and `gates_input_mutants.json`; exit code 1 where a gate fails or a mutant
lives.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "safety")]

import gate_canaries  # type: ignore[import-not-found]  # noqa: E402
import input_gates as gates  # type: ignore[import-not-found]  # noqa: E402
import mutants  # type: ignore[import-not-found]  # noqa: E402
import torch  # noqa: E402

RESULTS = ROOT / "scripts" / "results"


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(gates.GATES), default=list(gates.GATES))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--no-mutants", action="store_true")
    parser.add_argument("--no-gates", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found = {} if asked.no_gates else run_gates(asked.only, asked.quick)
    noticed = {} if asked.no_mutants else run_mutants(asked.only)
    if asked.only == list(gates.GATES):
        if found and not asked.quick:
            _write("gates_input.json", {"gates": found})
        if noticed:
            _write("gates_input_mutants.json", {"killed": sum(noticed.values()), "mutants": noticed})
    failed = [name for name, gate in found.items() if gate["failures"]]
    alive = [name for name, killed in noticed.items() if not killed]
    print(json.dumps({"failed_gates": failed, "living_mutants": alive}))
    sys.exit(1 if failed or alive else 0)


def _write(name: str, content: dict[str, Any]) -> None:
    machine = {"device": platform.machine(), "python": platform.python_version(), "torch": torch.__version__}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / name).write_text(json.dumps(machine | content, indent=1) + "\n", encoding="utf-8")


def run_gates(names: list[str], quick: bool) -> dict[str, Any]:
    """Run gates on one small run made for them; return cases, failures, numbers and seconds of each."""
    found = {}
    gates.warm_up()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "made").mkdir()
        made = gate_canaries.make_run(Path(folder) / "made")
        for name in names:
            began = time.monotonic()
            result = gates.run_gate(name, made, Path(folder), "quick" if quick else "long")
            seconds = round(time.monotonic() - began, 1)
            found[name] = {"cases": result.cases, "failures": result.failures, **result.numbers, "seconds": seconds}
            print(
                f"{name:20} {result.cases} cases, {len(result.failures)} failures, {seconds} s {result.numbers}",
                flush=True,
            )
            for failure in result.failures[:5]:
                print("   ", failure)
    return found


def run_mutants(names: list[str]) -> dict[str, bool]:
    """Break one guarded line after the other in a copy; return whether its gate noticed."""
    noticed = {}
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        for part in ("qd2mora", "tests", "scripts", "recipes"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        for gate, mutant in mutants.MUTANTS:
            if gate not in names:
                continue
            path = copy / "qd2mora" / mutant.file
            whole = path.read_text(encoding="utf-8")
            path.write_text(mutant.applied(whole), encoding="utf-8")
            label = f"{gate}: {mutant}"
            noticed[label] = not _holds(copy, gate)
            print("killed" if noticed[label] else "ALIVE ", label, flush=True)
            path.write_text(whole, encoding="utf-8")
    return noticed


def _holds(copy: Path, gate: str) -> bool:
    command = [sys.executable, "scripts/gates_input.py", "--quick", "--no-mutants", "--only", gate]
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True, check=False).returncode == 0


if __name__ == "__main__":
    main()
