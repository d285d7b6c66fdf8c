"""The runs that exports are measured on: real small bases, real rows, a routed adapter and a plain LoRA on the same.

What: a case names a base, its tasks and its steps; `recipe_of` writes rows and the recipe of one arm and one seed.
Why: `bench_export.py` measures exports of trained adapters, and a trained adapter costs most of the time.
How: `python scripts/export_cases.py DATA --work FOLDER [--case NAME]` trains what is missing; run again, it goes on.

The arms: D2MoRA (M 3, N 4, rank 8, all seven linears) and a plain LoRA of rank 27, the widest that its export has, both
with the same rows, steps, seeds, learning rate and scaling. On bases that read letters or short pieces, rows are short
ones and come without the instruction's frame; tasks of which too few rows are short enough are left out.
"""

import argparse
import gzip
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from qd2mora.disk.durable import write_atomically
from qd2mora.recipe import Recipe, load_recipe
from qd2mora.training import train

ROOT = Path(__file__).parents[1]
LINEARS = "[q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]"
ARMS = {
    "d2mora": "{method: d2mora, rank: 8, alpha: 16, down: {experts: 3}, up: {experts: 4}, penalty: 1.0e-4, targets: T}",
    "lora": "{method: lora, rank: 27, alpha: 54, targets: T}",
}
REASONING, COMMONSENSE = "multitask_cot", "commonsense/train"
ROWS, HELD_OUT = 1000, 40
"""Of each task: rows at most, and of these the rows held out."""
FITTING = 300
"""Rows of a task that must fit, for it to take part."""


@dataclass(frozen=True)
class Case:
    """`base`: a folder, below the data's `models` unless absolute. `characters`: of a row at most, frame excluded."""

    base: str
    tasks: str
    steps: int = 150
    max_length: int = 512
    is_framed: bool = False
    characters: int = 10_000


CASES = {
    "quickstart": Case("", "", steps=400),
    "stories reasoning": Case("stories260K-hf", REASONING, characters=300),
    "stories commonsense": Case("stories260K-hf", COMMONSENSE, characters=700),
    "babyllama reasoning": Case("babyllama105-hf", REASONING, max_length=256, characters=250),
    "babyllama commonsense": Case("babyllama105-hf", COMMONSENSE, max_length=256, characters=250),
    "small reasoning": Case("small", REASONING, is_framed=True),
    "small commonsense": Case("small", COMMONSENSE, is_framed=True, characters=1000),
}


def recipe_of(case: str, arm: str, seed: int, data: Path, work: Path) -> Recipe:
    """Return the recipe of one run; its rows and text are written below `work`."""
    here, folder = CASES[case], work / f"{case.replace(' ', '-')}-{arm}-{seed}"
    quiet = [f"train.seed={seed}", f"output={folder}", "finish.export=false", "finish.score=false"]
    if case == "quickstart":
        path = ROOT / "recipes" / ("quickstart.yaml" if arm == "d2mora" else "quickstart-lora.yaml")
        rank = [] if arm == "d2mora" else ["adapter.rank=27", "adapter.alpha=54"]
        return load_recipe(path, [*quiet, *rank, "train.eval_every=400", "train.save_every=400"])
    base = work / here.base if here.base == "small" else data / "models" / here.base
    kind = "instruction" if here.is_framed else "completion"
    tasks = "\n".join(
        f"    - {{name: {path.stem}, path: {path}, format: {kind}, validation: {HELD_OUT}}}"
        for path in _rows(case, data, work)
    )
    text = f"""base: {{model: {base}}}
adapter: {ARMS[arm].replace("T}", LINEARS + "}")}
data:
  tasks:
{tasks}
  max_length: {here.max_length}
  on_bad_row: skip
train: {{steps: {here.steps}, micro_batch: 8, global_batch: 8, learning_rate: 3.0e-3, warmup_steps: 20,
  save_every: {here.steps}, eval_every: {here.steps}, keep_best: none}}
output: {folder}
"""
    path = work / f"{folder.name}.yaml"
    write_atomically(path, text)
    return load_recipe(path, quiet)


def _rows(case: str, data: Path, work: Path) -> list[Path]:
    """Write the rows of each task that fit, the same for every arm and seed; return the files."""
    here, folder, found = CASES[case], work / f"{case.replace(' ', '-')}-rows", []
    folder.mkdir(parents=True, exist_ok=True)
    for source in sorted((data / here.tasks).glob("*.json*")):
        name = source.name.split(".")[0].replace("-", "_")
        opened = gzip.open(source, "rt", encoding="utf-8") if source.suffix == ".gz" else source.open(encoding="utf-8")
        with opened as file:
            pool = [_row(row, here.is_framed) for row in json.load(file)]
        fitting = [row for row in pool if sum(map(len, row.values())) <= here.characters]
        if len(fitting) < FITTING:
            continue
        order = np.random.default_rng([*name.encode()]).permutation(len(fitting))[:ROWS]
        path = folder / f"{name}.jsonl"
        write_atomically(path, "".join(json.dumps(fitting[place]) + "\n" for place in order))
        found.append(path)
    return found


def _row(row: dict[str, str], is_framed: bool) -> dict[str, str]:
    if is_framed:
        return {"instruction": row["instruction"], "input": "", "output": row["output"]}
    return {"prompt": f"{row['instruction'].strip()}\n", "completion": row["output"]}


def trained(case: str, arm: str, seed: int, data: Path, work: Path) -> Path:
    """Return the folder of a run, trained first where it is not there; its process seconds stand in `seconds.json`."""
    recipe = recipe_of(case, arm, seed, data, work)
    folder = Path(recipe.output)
    if not (folder / "seconds.json").is_file():
        began, wall = time.process_time(), time.perf_counter()
        train(recipe, overwrite=True)
        seconds = {"cpu": time.process_time() - began, "wall": time.perf_counter() - wall}
        write_atomically(folder / "seconds.json", json.dumps(seconds))
    return folder


def main() -> None:
    """Train every arm and seed of the cases asked for."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the real data: models/, multitask_cot/, commonsense/train/")
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs; a small base is its small/")
    parser.add_argument("--case", action="append", choices=sorted(CASES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", default="d2mora,lora")
    given = parser.parse_args()
    for case in given.case or CASES:
        for seed in range(given.seeds):
            for arm in given.arms.split(","):
                print(trained(case, arm, seed, given.data, given.work), flush=True)


if __name__ == "__main__":
    main()
