"""Train and evaluate the paper's Table 1, and print our numbers beside the published ones.

What: 18 runs (two 7B models, nine configurations each), each followed by the eight commonsense tests in the published
protocol (beam 4). Days on one GPU; what is done is not done again, and a run that was stopped goes on.
How:
    python scripts/table1.py --data LLM-Adapters/dataset --out runs/table1            # everything
    python scripts/table1.py --data ... --out ... --models llama2-7b --rows d2mora-m4-n3-r16 lora-r64
    python scripts/table1.py --dry-run                                                 # counts and memory, no weights
    python scripts/table1.py --write recipes/table1                                    # the recipes alone
`--base llama2-7b=FOLDER` takes a model from a folder. `qd2mora compare RECIPE --sweep ...` sweeps a row's rate.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from table1_rows import MODELS, NAMES, ROWS, TableRow, find_rows, recipe_of, yaml_of

from qd2mora.disk.durable import write_atomically, write_json
from qd2mora.evaluation import EvalOptions, Exam, evaluate
from qd2mora.memory import plan
from qd2mora.memory.choosing import GIB
from qd2mora.run_folder import RunFolder, is_run
from qd2mora.training import train


def run(row: TableRow, model: str, base: str | None, data: Path, out: Path) -> dict[str, Any]:
    """Train and score one row, or read what an earlier start wrote; return accuracies by task."""
    file = out / model / f"{row.name}.json"
    if not file.is_file():
        recipe = recipe_of(row, model, base, data).model_copy(update={"output": str(out / model / row.name)})
        folder = RunFolder(Path(recipe.output))
        if not (folder.adapter / "adapter_model.safetensors").is_file():
            train(recipe, resume=is_run(folder.path))
        exam = Exam(suite="commonsense", data=data)
        scores = evaluate(folder.path, exam, EvalOptions(beams=4, out=folder.path / "suite.json", is_shown=True))
        write_json(file, {name: score.to_json() for name, score in scores.items()})
    return dict(json.loads(file.read_text(encoding="utf-8")))


def line(row: TableRow, model: str, ours: dict[str, Any]) -> str:
    """Return a row of the table: ours by task, our mean, the published mean."""
    shares = [100 * ours[name]["accuracy"] for name in NAMES]
    cells = [model, row.name, f"{row.parameters / 1e6:.1f}", *(f"{share:.1f}" for share in shares)]
    return "| " + " | ".join([*cells, f"{sum(shares) / len(shares):.2f}", f"{row.published[model]:.2f}"]) + " |"


def dry_line(row: TableRow, model: str) -> str:
    """Return what a row will train and take, from the shape alone."""
    planned = plan(recipe_of(row, model, base=f"random:{model}"))
    ours = planned.trainable_parameters
    note = "" if abs(ours / 1e6 - row.printed) < 0.06 else " (differs)"
    return (
        f"| {model} | {row.name} | {ours:,} | {row.printed}{note} | {planned.peak_bytes / GIB:.1f} GiB, "
        f"{planned.micro_batch} rows | {row.published[model]:.2f} |"
    )


def write(folder: Path) -> None:
    """Write every row's recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    for model in MODELS:
        for row in ROWS:
            write_atomically(folder / f"{model}-{row.name}.yaml", yaml_of(row, model))


def main() -> None:
    """Read the command line, run, print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="dataset folder of LLM-Adapters: TASK/train.json, TASK/test.json")
    parser.add_argument("--out", type=Path, default=Path("runs/table1"))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rows", nargs="+", choices=[row.name for row in ROWS], default=[])
    parser.add_argument("--base", nargs="+", default=[], metavar="MODEL=FOLDER")
    parser.add_argument("--dry-run", action="store_true", help="plan every row; no weights, no GPU")
    parser.add_argument("--write", type=Path, help="write the recipes into this folder, and stop")
    given = parser.parse_args()
    if given.write:
        write(given.write)
        return
    chosen = [(row, model) for model in given.models for row in find_rows(given.rows)]
    if given.dry_run:
        print("| model | row | parameters | the paper's (million) | planned | published mean |")
        print("| --- | --- | --- | --- | --- | --- |")
        for row, model in chosen:
            print(dry_line(row, model), flush=True)
        return
    if given.data is None:
        parser.error("--data: name the dataset folder of LLM-Adapters")
    bases = dict(each.split("=", 1) for each in given.base)
    done = [line(row, model, run(row, model, bases.get(model), given.data, given.out)) for row, model in chosen]
    print("| model | row | parameters (M) | " + " | ".join(NAMES) + " | mean | published |")
    print("| --- " * (len(NAMES) + 5) + "|")
    print("\n".join(done))


if __name__ == "__main__":
    main()
