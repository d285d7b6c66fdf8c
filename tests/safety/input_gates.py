"""The gates on input, by name: each in a quick size for every change and a long one for `scripts/gates_input.py`."""

import importlib
import shutil
from collections.abc import Callable
from pathlib import Path

import gate_bombs
import gate_canaries
import gate_configs
import gate_files
import gate_finite
import gate_numbers
import gate_recipes
import gate_rows
import gate_streams
import gate_templates
import gate_terminal
import tiny
from forked import Result


def warm_up() -> None:
    """Import once what every fork needs."""
    for name in ("training", "run_folder", "report", "evaluation", "composition"):
        importlib.import_module(f"qd2mora.{name}")


def _masked(made: Path, folder: Path, quick: bool) -> Result:
    from qd2mora.base import load_tokenizer

    return gate_rows.gate_masked(folder, load_tokenizer(str(made / "base")))


# name: the gate, given a finished small run, an empty folder and whether to be quick
GATES: dict[str, Callable[[Path, Path, bool], Result]] = {
    "R1": lambda made, folder, quick: gate_recipes.gate(800 if quick else 10_000, folder),
    "D1": _masked,
    "D2": lambda made, folder, quick: gate_rows.gate(folder),
    "D2 before the model": lambda made, folder, quick: gate_rows.gate_before_the_model(folder),
    "P1": lambda made, folder, quick: gate_files.gate_payloads(made, folder, 1 if quick else 6),
    "V1": lambda made, folder, quick: gate_files.gate_names(made, folder, 5 if quick else 1),
    "Y1": lambda made, folder, quick: gate_files.gate_tricks(made, folder),
    "J1": lambda made, folder, quick: gate_templates.gate(13 if quick else 1),
    "BM1": lambda made, folder, quick: gate_bombs.gate_bombs(made, folder, 60 if quick else 1000),
    "NB1": lambda made, folder, quick: gate_numbers.gate(made, folder, 61 if quick else 1),
    "CF1": lambda made, folder, quick: gate_configs.gate(made, folder, 30 if quick else 5_000),
    "NF1": lambda made, folder, quick: gate_finite.gate(made, folder, 3 if quick else 1),
    "ST1": gate_streams.gate,
    "TM1": lambda made, folder, quick: gate_terminal.gate(made, folder, 12 if quick else 500),
    "X1": lambda made, folder, quick: gate_canaries.gate(made, folder, 5 if quick else 1),
}


def run_gate(name: str, made: Path, folder: Path, *, quick: bool) -> Result:
    """Run one gate in a folder of its own, which is removed where the gate holds."""
    work = folder / name.replace(" ", "-")
    work.mkdir()
    result = GATES[name](made, work, quick)
    if not result.failures:
        shutil.rmtree(work)
    return result


__all__ = ["GATES", "run_gate", "tiny", "warm_up"]
