"""Which method wins at equal size? The paper's table scaled down: real commonsense rows on a small base.

What: writes rows of the eight tasks and a recipe into the folder given, and runs `qd2mora compare` on them: D2MoRA,
LoRA, HydraLoRA and MoSLoRA of equal size, a learning-rate sweep for each, several seeds, real test rows.
Why: accuracy on the real 7B models takes days on a GPU; a base made by `scripts/make_small_base.py` learns in minutes,
and what it says about methods is said with an interval.
How: `python scripts/table1_small.py DATA --base BASE --out FOLDER`; the same command goes on after a kill. The outcome
is FOLDER/compare/compare.json. scripts/results/table1_small.json was made with --rows 600 --test-rows 50 --steps 50
--sweep-steps 25 --choose-rows 5 --strategies core_lsq, about twelve minutes of one core, table1_small_150.json with
--steps 150, the rate of that sweep and two seeds; both on a base that scripts/make_small_base.py tells of.
"""

import argparse
import gzip
import importlib.metadata
import json
import subprocess
import sys
from datetime import date
from pathlib import Path

import numpy as np
import torch

from qd2mora.disk.durable import write_atomically, write_json
from qd2mora.recipe.yaml_file import dump_yaml

TASKS = {
    "boolq": "boolq",
    "piqa": "piqa",
    "siqa": "social_i_qa",
    "hellaswag": "hellaswag",
    "winogrande": "winogrande",
    "arc_e": "ARC-Easy",
    "arc_c": "ARC-Challenge",
    "obqa": "openbookqa",
}
METHODS = "d2mora,lora,hydralora,moslora"


def write_rows(
    data: Path, folder: Path, number: int, test: int, chosen: dict[str, str] = TASKS
) -> list[dict[str, object]]:
    """Write `number` rows to learn and `test` rows to test on for each task; return the recipe's tasks."""
    folder.mkdir(parents=True, exist_ok=True)
    tasks: list[dict[str, object]] = []
    for name, file in chosen.items():
        with gzip.open(data / "commonsense" / "train" / f"{file}.json.gz", "rt", encoding="utf-8") as source:
            pool = json.load(source)
        order = np.random.default_rng([*name.encode()]).permutation(len(pool))[:number]
        asked = json.loads((data / "commonsense" / "test_500" / f"{file}.json").read_text(encoding="utf-8"))[:test]
        for part, rows in (("learn", [pool[place] for place in order]), ("test", asked)):
            kept = [{key: row[key] for key in ("instruction", "input", "output")} for row in rows]
            write_atomically(folder / f"{name}.{part}.jsonl", "".join(json.dumps(row) + "\n" for row in kept))
        tasks.append({"name": name, "path": f"rows/{name}.learn.jsonl", "validation": f"rows/{name}.test.jsonl"})
    return [task | {"metric": "choice", "weight": 1.0} for task in tasks]


def recipe(base: Path, tasks: list[dict[str, object]], steps: int) -> dict[str, object]:
    """Return the recipe: D2MoRA with the paper's experts, M 4 and N 3, on q, k and v."""
    return {
        "base": {"model": str(base.resolve()), "quantization": "nf4", "compute_dtype": "bfloat16"},
        "adapter": {
            "method": "d2mora",
            "rank": 8,
            "alpha": 16,
            "targets": ["q_proj", "k_proj", "v_proj"],
            "down": {"experts": 4},
            "up": {"experts": 3},
        },
        "data": {"tasks": tasks, "max_length": 384, "on_bad_row": "skip"},
        "train": {
            "steps": steps,
            "micro_batch": 8,
            "global_batch": 8,
            "learning_rate": 3e-3,
            "warmup_steps": 10,
            "save_every": 1000,
            "eval_every": 1000,
            "keep_best": "none",
        },
        "output": "run",
    }


def result(compared: Path, base: Path) -> dict[str, object]:
    """Return a comparison's outcome without the places of this machine, with what is known of its base."""
    content = json.loads((compared / "compare.json").read_text(encoding="utf-8"))
    recipe = content["recipe"]
    recipe["base"]["model"] = base.name
    recipe["output"] = Path(recipe["output"]).name
    for task in recipe["data"]["tasks"]:
        for key in ("path", "validation"):
            if isinstance(task[key], str):
                task[key] = Path(task[key]).name
    report = base.parent / "report.json"
    known = json.loads(report.read_text(encoding="utf-8")) if report.is_file() else {}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")}
    command = " ".join(Path(word).name if "/" in word else word for word in sys.argv)
    made = {"device": "cuda" if torch.cuda.is_available() else "cpu", "date": date.today().isoformat()}
    return {**content, "base": known, **made, "command": command, **versions}


def main() -> None:
    """Read the command line, write rows and recipe, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the real data: commonsense/train, commonsense/test_500")
    parser.add_argument("--base", type=Path, required=True, help="folder of the small base")
    parser.add_argument("--out", type=Path, required=True, help="folder to write into, or to go on in")
    parser.add_argument("--rows", type=int, default=1000, help="rows of each task to learn from")
    parser.add_argument("--test-rows", type=int, default=500, help="rows of each task to test on")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--sweep-steps", type=int, default=200)
    parser.add_argument("--sweep", default="2e-3,6e-3,2e-2")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--choose-rows", type=int, default=50)
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--strategies", default="core_lsq,mean_gate", help="exports to try")
    parser.add_argument("--result", type=Path, help="JSON file for the outcome, without this machine's places")
    given = parser.parse_args()
    tasks = write_rows(given.data, given.out / "rows", given.rows, given.test_rows)
    write_atomically(given.out / "recipe.yaml", dump_yaml(recipe(given.base, tasks, given.steps)))
    command = [sys.executable, "-c", "from qd2mora.cli import main; main()", "compare", str(given.out / "recipe.yaml")]
    command += ["--methods", given.methods, "--seeds", str(given.seeds), "--sweep", given.sweep]
    command += ["--sweep-steps", str(given.sweep_steps), "--choose-rows", str(given.choose_rows)]
    command += ["--strategies", given.strategies, "--out", str(given.out / "compare")]
    code = subprocess.run(command, check=False).returncode
    if code == 0 and given.result:
        write_json(given.result, result(given.out / "compare", given.base))
    sys.exit(code)


if __name__ == "__main__":
    main()
