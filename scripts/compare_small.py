"""Does D2MoRA beat one LoRA of equal size on held-out loss? Real rows of many tasks, real weights, three seeds.

What: writes a recipe into the folder given and runs `qd2mora compare` on it with two arms: both try the same learning
rates on rows apart from the test rows, and are scored as trained and as their best static export. `reasoning`: five
tasks of question and rationale, 1,000 rows each; the rationale is learned. `commonsense`: four tasks of the paper whose
prompts fit the base, answers "the correct answer is ..."; official test rows. `eight`: all of the paper's tasks, for a
base that can read them, such as SmolLM2 (`python scripts/get_smollm2.py`, then --base the file that it names).
`cloze`: the same eight as a base reads them: the question, and the words of the right answer to go on with; tested by
which choice's words are likeliest, and beside the arms stands the base itself.
`conflicting`: three tasks that ask the same and want something else: the reason, the answer, or the question's first
words again; no word of the prompt tells which. A model that is not told the task can only hedge.
Why: the loss over a rationale is of prose that differs by task; that of a fixed sentence with one free word tells less,
but it is the paper's.
With `--arms scripts/hypotheses.yaml --methods lora,d2mora,one-down,...` other forms and settings beside the two.
How: `python scripts/compare_small.py DATA --base BASE --out FOLDER [--set commonsense] --result FILE`; the same command
goes on after a kill. scripts/results/d2mora_lora_reasoning.json was made with the defaults, on a LLaMA of 260,032
parameters (tinyllamas' stories260K); its sweep runs half as many steps as the others.
"""

import argparse
import gzip
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from table1_small import TASKS, result, write_rows

from qd2mora.comparison.intervals import Values, difference, interval, macro
from qd2mora.disk.durable import write_atomically, write_json
from qd2mora.evaluation.suites import find_suite, read_items
from qd2mora.recipe.yaml_file import dump_yaml

SETS = ("reasoning", "commonsense", "eight", "cloze", "conflicting")
REASONING = ("creak", "ecqa", "qasc", "sensemaking", "strategyqa")
FITTING = ("siqa", "winogrande", "obqa", "arc_e")
TEST_ROWS = 80


def reasoning(data: Path, test: int = TEST_ROWS) -> list[dict[str, object]]:
    """Return the five tasks; what is held out is drawn by the task's name and the recipe's seed."""
    return [
        {
            "name": name,
            "path": str((data / "multitask_cot" / f"{name}.json").resolve()),
            "format": "completion",
            "fields": {"prompt": "instruction", "completion": "rationale"},
            "weight": 1.0,
            "validation": test,
            "metric": "loss",
        }
        for name in REASONING
    ]


def commonsense(data: Path, folder: Path, names: Iterable[str], test: int = TEST_ROWS) -> list[dict[str, object]]:
    """Write rows to learn and rows to test on; return the tasks that read them."""
    chosen = {name: TASKS[name] for name in names}
    return write_rows(data, folder / "rows", 1000, test, chosen)


def conflicting(data: Path, folder: Path, name: str = "creak", number: int = 1000) -> list[dict[str, object]]:
    """Write three tasks with the same prompts and other answers; return them."""
    rows = json.loads((data / "multitask_cot" / f"{name}.json").read_text(encoding="utf-8"))[:number]
    wanted = {
        "reason": lambda row: row["rationale"],
        "answer": lambda row: row["output"],
        "again": lambda row: " ".join(row["instruction"].split()[:8]),
    }
    (folder / "rows").mkdir(parents=True, exist_ok=True)
    tasks: list[dict[str, object]] = []
    for task, of in wanted.items():
        lines = [json.dumps({"prompt": f"{row['instruction']}\n", "completion": of(row)}) + "\n" for row in rows]
        write_atomically(folder / "rows" / f"{task}.jsonl", "".join(lines))
        shared: dict[str, object] = {"format": "completion", "weight": 1.0, "validation": TEST_ROWS, "metric": "loss"}
        tasks.append({"name": task, "path": f"rows/{task}.jsonl", **shared})
    return tasks


def cloze(data: Path, folder: Path, number: int = 1000) -> list[dict[str, object]]:
    """Write rows to learn as the suite's cloze words them; return the tasks. What is tested are the suite's files."""
    suite, tasks = find_suite("commonsense"), list[dict[str, object]]()
    for name in ("pool", "rows"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for task in suite.tasks:
        with gzip.open(data / "commonsense" / "train" / f"{task.file}.json.gz", "rt", encoding="utf-8") as source:
            pool = json.load(source)
        order = np.random.default_rng([*task.name.encode()]).permutation(len(pool))[:number]
        write_json(folder / "pool" / f"{task.file}.json", [pool[place] for place in order])
        items = read_items(suite, task, folder / "pool", "cloze")
        lines = [json.dumps({"prompt": item.pair.prompt, "completion": item.pair.answer}) + "\n" for item in items]
        write_atomically(folder / "rows" / f"{task.name}.jsonl", "".join(lines))
        shared: dict[str, object] = {"format": "completion", "weight": 1.0, "validation": 0, "metric": "loss"}
        tasks.append({"name": task.name, "path": f"rows/{task.name}.jsonl", **shared})
    return tasks


def beside_base(out: Path, seeds: int, asked: list[str]) -> dict[str, object]:
    """Ask the base the test rows, its adapter off; return its scores, and each arm's gain with its 95% interval."""
    arms = {arm["name"]: arm for arm in json.loads((out / "compare" / "compare.json").read_text("utf-8"))["arms"]}
    run = out / "compare" / "runs" / next(iter(arms)) / "seed-0"
    place = out / "base.json"
    command = [sys.executable, "-m", "qd2mora", "eval", str(run), "--against", "base", "--out", str(place), *asked]
    subprocess.run(command, check=True)
    base: dict[str, list[float]] = {}
    for line in place.with_suffix(".against.rows.jsonl").read_text("utf-8").splitlines()[1:]:
        row = json.loads(line)
        base.setdefault(row["task"], []).append(row["value"])
    once = {task: np.array([values]) for task, values in base.items()}
    found: dict[str, object] = {"score": macro(once), "interval": interval(once)}
    found["by_task"] = {task: float(values.mean()) for task, values in once.items()}
    gains = {}
    for name in arms:
        files = [out / "compare" / "results" / name / f"seed-{seed}.json" for seed in range(seeds)]
        tasks = [json.loads(file.read_text("utf-8"))["found"]["trained"] for file in files]
        scores: Values = {task: np.array([each[task]["values"] for each in tasks]) for task in base}
        gained = difference(scores, {task: np.repeat(values, seeds, axis=0) for task, values in once.items()})
        gains[name] = {"gain": macro(gained), "interval": interval(gained)}
    return found | {"gains": gains}


def recipe(base: Path, tasks: list[dict[str, object]], steps: int, rank: int, batch: int) -> dict[str, object]:
    """Return the recipe: D2MoRA with the paper's experts, M 4 and N 3, on q, k and v."""
    return {
        "base": {"model": str(base.resolve()), "quantization": "nf4", "compute_dtype": "float32"},
        "adapter": {
            "method": "d2mora",
            "rank": rank,
            "alpha": 2 * rank,
            "targets": ["q_proj", "k_proj", "v_proj"],
            "down": {"experts": 4},
            "up": {"experts": 3},
        },
        "data": {"tasks": tasks, "max_length": 512, "on_bad_row": "skip"},
        "train": {
            "steps": steps,
            "micro_batch": batch,
            "global_batch": batch,
            "learning_rate": 1e-2,
            "warmup_steps": steps // 10,
            "save_every": steps,
            "eval_every": steps,
            "keep_best": "none",
        },
        "output": "run",
    }


def main() -> None:
    """Read the command line, write the recipe, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the real data: commonsense/, multitask_cot/")
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder to write into, or to go on in")
    parser.add_argument("--set", choices=SETS, default="reasoning")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--sweep-steps", type=int, default=75)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8, help="rows a step")
    parser.add_argument("--sweep", default="3e-3,1e-2,3e-2,1e-1")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", type=Path, help="more arms, for example scripts/hypotheses.yaml")
    parser.add_argument("--methods", default="d2mora,lora", help="the first is what the others are compared with")
    parser.add_argument("--targets", default="recipe", help="own: each method's own linears, as its authors train it")
    parser.add_argument("--choose-rows", type=int, default=20, help="rows a task to choose a rate by")
    parser.add_argument("--test-rows", type=int, default=TEST_ROWS, help="rows a task to test on")
    parser.add_argument("--strategies", default="auto", help="exports to score; none: as trained alone")
    parser.add_argument("--result", type=Path, help="JSON file for the outcome, without this machine's places")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.set == "reasoning":
        tasks = reasoning(given.data, given.test_rows)
    elif given.set == "conflicting":
        tasks = conflicting(given.data, given.out)
    elif given.set == "cloze":
        tasks = cloze(given.data, given.out)
    else:
        names = FITTING if given.set == "commonsense" else TASKS
        tasks = commonsense(given.data, given.out, names, given.test_rows)
    write_atomically(
        given.out / "recipe.yaml", dump_yaml(recipe(given.base, tasks, given.steps, given.rank, given.batch))
    )
    command = [sys.executable, "-m", "qd2mora", "compare", str(given.out / "recipe.yaml"), "--methods", given.methods]
    command += ["--seeds", str(given.seeds), "--sweep", given.sweep]
    command += ["--choose-rows", str(given.choose_rows)]
    command += ["--sweep-steps", str(given.sweep_steps)]
    command += ["--out", str(given.out / "compare"), "--targets", given.targets]
    command += ["--no-export"] if given.strategies == "none" else ["--strategies", given.strategies]
    command += [] if given.arms is None else ["--arms", str(given.arms)]
    asked = ["--suite", "commonsense", "--data", str(given.data / "commonsense" / "test_500")]
    asked += ["--scoring", "likelihood", "--prompt", "cloze", "--limit", str(given.test_rows)]
    command += asked if given.set == "cloze" else []
    code = subprocess.run(command, check=False).returncode
    if code == 0 and given.result:
        found = result(given.out / "compare", given.base)
        if given.set == "cloze":
            found["base_scores"] = beside_base(given.out, given.seeds, asked)
        write_json(given.result, found)
    sys.exit(code)


if __name__ == "__main__":
    main()
