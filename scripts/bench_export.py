"""How much of a routed adapter survives in plain weights, and was it worth routing at all?

    python scripts/bench_export.py --work /tmp/export-runs
    python scripts/bench_export.py --work /tmp/export-runs --model FOLDER --data FOLDER --seeds 1

Trains D2MoRA (M 3, N 4, rank 8, all seven linears) and one plain LoRA of the same rank as the export (27) on the same
rows and steps: the quickstart, or with `--model` a base of yours on every json file of `--data` (rows of instruction,
input and output; 100 of each held out). Finished runs in `--work` are used again. Then makes every export and measures
it on held-out rows. Prints a table and as the last line JSON, which `--out` also writes to a file.
"""

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

from qd2mora.merging import core_lsq
from qd2mora.merging.auto import SHARE
from qd2mora.merging.fidelity import Fidelity, measure
from qd2mora.merging.making import setting_of
from qd2mora.merging.sample import batches_of, sample_rows
from qd2mora.merging.static import Statics, of_cores
from qd2mora.merging.statistics import collect, decode
from qd2mora.merging.strategies import STRATEGIES
from qd2mora.recipe import Recipe, load_recipe
from qd2mora.run_folder import OpenRun, open_run
from qd2mora.training import train

ROOT = Path(__file__).parents[1]
LINEARS = "[q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]"
ADAPTERS = {
    "d2mora": "{method: d2mora, rank: 8, alpha: 16, down: {experts: 3}, up: {experts: 4}, penalty: 1.0e-4, targets: T}",
    "lora": "{method: lora, rank: 27, alpha: 54, targets: T}",
}
WHOLE = ("mean_gate", "core_lsq", "sequential", "auto", "distill")


def main() -> None:
    """Train what is missing, export in every way, print."""
    torch.set_num_threads(1)
    settings = _arguments()
    name = "reasoning" if settings.model else "quickstart"
    numbers = []
    for seed in range(settings.seeds):
        runs = {
            kind: _trained(_recipe(settings, kind, seed), settings.work / f"{name}-{kind}-{seed}")
            for kind in (ADAPTERS if seed < settings.lora_seeds else ["d2mora"])
        }
        numbers.append({"seed": seed} | _measured(runs, settings.held_out))
        _show(numbers[-1])
    line = json.dumps({"name": name, "runs": numbers, "torch": torch.__version__, "machine": platform.machine()})
    if settings.out:
        settings.out.write_text(line + "\n", encoding="utf-8")
    print(line)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lora-seeds", type=int, default=3, help="seeds that train the plain LoRA too")
    parser.add_argument("--held-out", type=int, default=512, help="held-out rows to measure on")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def _recipe(settings: argparse.Namespace, kind: str, seed: int) -> Recipe:
    adapter = ADAPTERS[kind].replace("T}", LINEARS + "}")
    folder = settings.work / f"{'reasoning' if settings.model else 'quickstart'}-{kind}-{seed}"
    changes = [f"train.seed={seed}", f"output={folder}", "finish.export=false", "finish.score=false"]
    if settings.model is None:
        if kind == "d2mora":
            return load_recipe(ROOT / "recipes" / "quickstart.yaml", changes)
        return load_recipe(ROOT / "recipes" / "quickstart-lora.yaml", [*changes, "adapter.rank=27", "adapter.alpha=54"])
    tasks = "\n".join(
        f"    - {{name: {path.stem}, path: {path}, validation: 100}}" for path in sorted(settings.data.glob("*.json"))
    )
    text = f"""
base: {{model: {settings.model}}}
adapter: {adapter}
data:
  tasks:
{tasks}
  max_length: 512
train: {{steps: 300, micro_batch: 8, global_batch: 8, learning_rate: 3.0e-3, warmup_steps: 20, save_every: 300}}
output: {folder}
"""
    settings.work.mkdir(parents=True, exist_ok=True)
    path = settings.work / f"{folder.name}.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, changes)


def _trained(recipe: Recipe, folder: Path) -> OpenRun:
    if not (folder / "adapter" / "adapter_model.safetensors").is_file():
        train(recipe, overwrite=True)
    return open_run(folder)


def _measured(runs: dict[str, OpenRun], limit: int) -> dict[str, Any]:
    opened = runs["d2mora"]
    names = [task.name for task in opened.recipe.data.tasks]
    rows = sample_rows(opened, None)
    held_out = batches_of(opened, rows.held_out[:: max(1, len(rows.held_out) // limit)])
    found: dict[str, Any] = {"training_s": _training_seconds(opened), **_closed_form_times(opened)}
    for strategy in WHOLE:
        sample = sample_rows(opened, None, STRATEGIES[strategy].share)
        setting, began = setting_of(opened, sample, None), time.perf_counter()
        statics = STRATEGIES[strategy].make(setting)
        seconds = time.perf_counter() - began
        found[strategy] = _kept(measure(opened.model, statics, held_out, names)) | {"s": round(seconds, 1)}
        found[strategy] |= {"notes": setting.notes} if setting.notes else {}
    plain = _without_routers(opened)
    found["core_lsq without router rows"] = _kept(measure(opened.model, plain, held_out, names))
    found["per_task"] = _per_task(opened)
    if "lora" in runs:
        found["lora"] = {"loss": round(measure(runs["lora"].model, {}, held_out).routed, 4)}
    return found


def _per_task(opened: OpenRun) -> dict[str, Any]:
    """Least squares on each task's own rows, measured on its held-out rows; gain kept over all tasks together."""
    kept, base, routed, merged = {}, 0.0, 0.0, 0.0
    for number, task in enumerate(opened.recipe.data.tasks):
        rows = sample_rows(opened, number, SHARE)
        held_out = batches_of(opened, rows.held_out[:50])
        fidelity = measure(opened.model, STRATEGIES["per_task"].make(setting_of(opened, rows, None)), held_out)
        kept[task.name] = None if fidelity.gain_kept is None else round(fidelity.gain_kept, 5)
        base, routed = base + fidelity.base * fidelity.tokens, routed + fidelity.routed * fidelity.tokens
        merged += fidelity.merged * fidelity.tokens
    return {"kept": round((base - merged) / (base - routed), 5), "tasks": kept}


def _without_routers(opened: OpenRun) -> Statics:
    moments = setting_of(opened, sample_rows(opened, None, SHARE), None).moments()
    cores = {name: core_lsq.mixing(each, with_routers=False) for name, each in moments.items()}
    return of_cores(opened.model, cores)


def _closed_form_times(opened: OpenRun) -> dict[str, float]:
    batches = batches_of(opened, sample_rows(opened, None).calibration)[:16]
    began = time.perf_counter()
    with torch.no_grad():
        for batch in batches:
            decode(opened.model, batch)
    plain = time.perf_counter() - began
    began = time.perf_counter()
    moments = collect(opened.model, batches, with_mixing=False)
    of_cores(opened.model, {name: core_lsq.mixing(each) for name, each in moments.items()})
    return {"closed form / plain forward": round((time.perf_counter() - began) / plain, 2)}


def _training_seconds(opened: OpenRun) -> float:
    """Return the seconds that the steps took, from the run's own log."""
    lines = [json.loads(line) for line in opened.folder.metrics.read_text(encoding="utf-8").splitlines()]
    steps = {line["step"]: line for line in lines if "tokens_per_s" in line}
    seconds = sum(line["tokens"] / line["tokens_per_s"] for line in steps.values())
    return round(seconds * max(steps) / len(steps), 1)


def _kept(fidelity: Fidelity) -> dict[str, Any]:
    content = {"base": fidelity.base, "routed": fidelity.routed, "loss": fidelity.merged}
    content |= {"kl": fidelity.kl_per_token, "agreement": fidelity.agreement}
    worst = min(fidelity.tasks.items(), key=lambda pair: pair[1].gain_kept or 1.0)
    return {name: round(value, 5) for name, value in content.items()} | {
        "kept": None if fidelity.gain_kept is None else round(fidelity.gain_kept, 5),
        "worst_task": {worst[0]: worst[1].gain_kept},
    }


def _show(found: dict[str, Any]) -> None:
    for name, each in found.items():
        if isinstance(each, dict) and "kept" in each:
            print(f"seed {found['seed']}  {name:30} kept {each['kept']:.2%}  KL {each.get('kl', float('nan')):.4f}")
    print({name: each for name, each in found.items() if not isinstance(each, dict)}, found.get("lora"))


if __name__ == "__main__":
    main()
