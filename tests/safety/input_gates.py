"""The gates on input, by name, each in three sizes: of the tests, of the mutants (quick) and of `gates_input.py`."""

import importlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

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


Size = Literal["brief", "quick", "long"]


def _masked(made: Path, folder: Path, size: Size) -> Result:
    from qd2mora.base import load_tokenizer

    return gate_rows.gate_masked(folder, load_tokenizer(str(made / "base")))


# name: the gate, given a finished small run, an empty folder and its size
GATES: dict[str, Callable[[Path, Path, Size], Result]] = {
    "R1": lambda made, folder, size: gate_recipes.gate({"brief": 400, "quick": 800, "long": 10_000}[size], folder),
    "D1": _masked,
    "D2": lambda made, folder, size: gate_rows.gate(folder),
    "D2 before the model": lambda made, folder, size: gate_rows.gate_before_the_model(folder),
    "P1": lambda made, folder, size: gate_files.gate_payloads(made, folder, 6 if size == "long" else 1),
    "V1": lambda made, folder, size: gate_files.gate_names(made, folder, {"brief": 10, "quick": 5, "long": 1}[size]),
    "Y1": lambda made, folder, size: gate_files.gate_tricks(made, folder),
    "J1": lambda made, folder, size: gate_templates.gate({"brief": 26, "quick": 13, "long": 1}[size]),
    "BM1": lambda made, folder, size: gate_bombs.gate_bombs(made, folder, 1000 if size == "long" else 40),
    "NB1": lambda made, folder, size: gate_numbers.gate(made, folder, 1 if size == "long" else 61),
    "CF1": lambda made, folder, size: gate_configs.gate(made, folder, {"brief": 5, "quick": 12, "long": 5_000}[size]),
    "NF1": lambda made, folder, size: gate_finite.gate(made, folder, 1 if size == "long" else 3),
    "ST1": lambda made, folder, size: gate_streams.gate(made, folder, size != "long"),
    "TM1": lambda made, folder, size: gate_terminal.gate(made, folder, 500 if size == "long" else 12),
    "X1": lambda made, folder, size: gate_canaries.gate(made, folder, {"brief": 9, "quick": 5, "long": 1}[size]),
}


def run_gate(name: str, made: Path, folder: Path, size: Size) -> Result:
    """Run one gate in a folder of its own, which is removed where the gate holds."""
    work = folder / name.replace(" ", "-")
    work.mkdir()
    result = GATES[name](made, work, size)
    if not result.failures:
        shutil.rmtree(work)
    return result


__all__ = ["GATES", "Size", "run_gate", "tiny", "warm_up"]
