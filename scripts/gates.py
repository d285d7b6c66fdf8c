"""Do all gates hold in their long size, and does each notice the loss of its guards?

    python scripts/gates.py                          # every gate, long: about an hour on one core
    python scripts/gates.py --only K1,B1 --scale 0.1 # some, in a tenth of the size
    GATE_SECONDS=1800 python scripts/gates.py --only K1  # as many of its kills as there is time for
    python scripts/gates.py --mutations              # each guard removed in a copy: its gate has to fail
    python scripts/gates.py --quick                  # the sizes of every change, on two cores: at most 6 minutes

The gates are listed in `tests/gate_list.py` (faults) and `tests/safety/input_gates.py` (input). What ran is added to
`scripts/results/gates.json`, or `gates_mutations.json`; exit code 1 where a gate fails or a mutant lives.
"""

import argparse
import contextlib
import ctypes
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "tests"), str(ROOT / "tests" / "safety")]

from gate_list import GATES, Gate  # type: ignore[import-not-found]  # noqa: E402
from input_gates import GATES as INPUT  # type: ignore[import-not-found]  # noqa: E402

HALVES = (
    ("test_kills", "test_power", "test_identity", "test_machine", "test_checkpoints", "test_exports"),
    ("test_steps", "test_guards", "test_two_ranks"),
)
"""Of the quick set, beside the gates on input, so that two cores take about as long."""
RESULTS = ROOT / "scripts" / "results"
MEMORY = Path("/dev/shm")
"""Where runs are made, so that a kill waits for no disk; the gate of power cuts has a disk of its own."""


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="names with commas between")
    parser.add_argument("--scale", type=float, default=1.0, help="of the long sizes")
    parser.add_argument("--mutations", action="store_true")
    parser.add_argument("--quick", action="store_true")
    asked = parser.parse_args()
    _adopt_orphans()
    if asked.quick:
        found = run_quick()
        _add("gates.json", "quick set", found)
        print(json.dumps(found))
        sys.exit(int(bool(found["failures"])))
    names = asked.only.split(",") if asked.only else [*GATES, *INPUT]
    unknown = [name for name in names if name not in GATES and name not in INPUT]
    if unknown:
        parser.error(f"no gate {unknown[0]}; there are {', '.join([*GATES, *INPUT])}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    is_red = False
    for name in names:
        if asked.mutations:
            found = {"mutants": run_mutants(name)}
            is_bad = not all(found["mutants"].values())
            _add("gates_mutations.json", name, found)
        else:
            found = run_gate(name, asked.scale)
            is_bad = bool(found["failures"])
            _add("gates.json", name, found | {"scale": asked.scale})
        is_red = is_red or is_bad
        print(name, json.dumps(found), flush=True)
    sys.exit(int(is_red))


def run_gate(name: str, scale: float) -> dict[str, Any]:
    """Run one gate in its long size; return counts, failures, numbers and seconds."""
    began, began_cpu = time.monotonic(), _processor_seconds()
    found = _run_tests(ROOT, GATES[name], _scaled(GATES[name], scale)) if name in GATES else _run_input(name, scale)
    seconds, cpu_s = time.monotonic() - began, _processor_seconds() - began_cpu
    return {**found, "seconds": round(seconds, 1), "cpu_s": round(cpu_s, 1), "load": round(os.getloadavg()[0], 1)}


def run_quick() -> dict[str, Any]:
    """Run all gates in the sizes of every change, half on each of two cores."""
    began, began_cpu = time.monotonic(), _processor_seconds()
    halves = [tuple(f"tests/reliability/{name}.py" for name in half) for half in HALVES]
    halves[1] += ("tests/safety",)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda tests: _run_tests(ROOT, Gate("", tests), {}), halves))
    return {
        "tests": sum(each["tests"] for each in found),
        "failures": [failure for each in found for failure in each["failures"]],
        "counted": [line for each in found for line in each["counted"]],
        "seconds": round(time.monotonic() - began, 1),
        "cpu_s": round(_processor_seconds() - began_cpu, 1),
        "load": round(os.getloadavg()[0], 1),
    }


def run_mutants(name: str) -> dict[str, bool]:
    """Break one guard after the other in a copy of the tree; return whether the gate noticed."""
    if name in INPUT:
        import gates_input

        return gates_input.run_mutants([name])
    noticed = {}
    gate: Gate = GATES[name]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        for part in ("qd2mora", "tests", "scripts", "recipes"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        for mutant in gate.mutants:
            path = copy / "qd2mora" / mutant.file
            whole = path.read_text(encoding="utf-8")
            path.write_text(mutant.applied(whole), encoding="utf-8")
            label = str(mutant)
            found = _run_tests(copy, gate, {name: str(value) for name, value in gate.quick.items()}, "-x")
            noticed[label] = bool(found["failures"])
            print("killed" if noticed[label] else "ALIVE ", name, label, found["failures"][:1], flush=True)
            path.write_text(whole, encoding="utf-8")
    return noticed


def _adopt_orphans() -> None:
    """Become the parent of what a test leaves, the servers that it forks from, so that their time is counted."""
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def _processor_seconds() -> float:
    """Return what this process and all that it has waited for have used."""
    last = time.monotonic() + 5
    with contextlib.suppress(ChildProcessError):
        while time.monotonic() < last:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.05)
    return sum(os.times()[:4])


def _scaled(gate: Gate, scale: float) -> dict[str, str]:
    return {key: str(max(1, round(size * scale))) for key, size in gate.long.items()}


def _run_tests(tree: Path, gate: Gate, sizes: dict[str, str], *options: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-s",
            "-m",
            "",
            "-p",
            "no:cacheprovider",
            f"--basetemp={folder}/work",
        ]
        environment = os.environ | sizes | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
        ended = subprocess.run(
            [*command, f"--junitxml={report}", *options, *gate.tests],
            cwd=tree,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if not report.exists():
            return {"tests": 0, "failures": [ended.stdout[-500:] + ended.stderr[-500:]], "sizes": sizes}
        cases = list(ElementTree.parse(report).iter("testcase"))
    failures = [
        f"{case.get('name')}: {(trouble.get('message') or '')[:300]}"
        for case in cases
        for trouble in (*case.findall("failure"), *case.findall("error"))
    ]
    if not cases or (ended.returncode and not failures):
        failures.append(f"pytest ended with {ended.returncode}: {ended.stdout[-300:]}")
    numbers = re.findall(r"^\.*([A-Z]+\d .*=.*)$", ended.stdout, re.MULTILINE)
    return {"tests": len(cases), "failures": failures, "sizes": sizes, "counted": numbers}


def _run_input(name: str, scale: float) -> dict[str, Any]:
    import gates_input

    return dict(gates_input.run_gates([name], scale < 1)[name])


def _add(file: str, name: str, found: dict[str, Any]) -> None:
    """Put a gate's result beside those of the others."""
    path = RESULTS / file
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    versions = {each: version(each) for each in ("torch", "transformers", "peft", "bitsandbytes", "safetensors")}
    how = "--quick" if name == "quick set" else f"--only {json.dumps(name)}"
    command = f"python scripts/gates.py {how}" + (" --mutations" if "mutants" in found else "")
    command += f" --scale {found['scale']}" if found.get("scale", 1.0) != 1.0 else ""
    if "GATE_SECONDS" in os.environ:
        command = f"GATE_SECONDS={os.environ['GATE_SECONDS']} {command}"
    results[name] = found | {
        "command": command,
        "commit": _commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, 1 thread",
        "python": platform.python_version(),
        "versions": versions,
    }
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _commit() -> str:
    """Return the commit that ran, marked where files differ from it (results aside)."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--", ".", f":!{RESULTS.relative_to(ROOT)}")
    return git("rev-parse", "--short=12", "HEAD") + (" with changes" if changed else "")


if __name__ == "__main__":
    main()
