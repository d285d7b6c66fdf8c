"""How much of a routed adapter survives in plain weights, what does it cost, and was it worth routing at all?

    python scripts/bench_export.py DATA --work FOLDER [--case NAME] [--seeds 3] [--out scripts/results/export-cpu.json]

Takes the runs of `scripts/export_cases.py`, training those that are missing, makes every export and measures it on
held-out rows: the share of the adapter's loss gain that it keeps. Work is the process's own CPU seconds, so that a busy
machine counts little. The honest question is `export minus lora`: the loss of the best export less that of a plain LoRA
of its rank trained on the same rows and steps. Means over seeds come with 95% intervals (Student's t). What is measured
already in FOLDER is used again; other cases in `--out` stay.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from export_cases import CASES, trained

from qd2mora.disk.durable import write_json
from qd2mora.merging import core_lsq
from qd2mora.merging.fidelity import Fidelity, measure
from qd2mora.merging.measured_updates import strategy_inputs_of
from qd2mora.merging.sample import PaddedBatches, batches_of, sample_rows
from qd2mora.merging.static_updates import Statics, of_cores
from qd2mora.merging.statistics import balanced, collect, decode
from qd2mora.merging.strategies import STRATEGIES
from qd2mora.mixture import mixture_layers
from qd2mora.run_folder import OpenRun, open_run

WHOLE = ("mean_gate", "core_lsq", "auto")
HELD_OUT = 140
"""Rows to measure on, evenly over tasks."""
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
"""97.5% quantile of Student's t by degrees of freedom."""


def main() -> None:
    """Measure, and write each case as it is done."""
    torch.set_num_threads(1)
    given = _arguments()
    for case in given.case or CASES:
        runs = [_seed(case, seed, given) for seed in range(given.seeds)]
        content = json.loads(given.out.read_text(encoding="utf-8")) if given.out and given.out.is_file() else {}
        content[case] = {"summary": _summary(runs), "runs": runs, "versions": _versions(), "command": given.command}
        print(case, json.dumps(content[case]["summary"]), flush=True)
        if given.out:
            write_json(given.out, content)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--case", action="append", choices=sorted(CASES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks-of", type=int, default=1, help="seeds whose tasks are exported one by one too")
    parser.add_argument("--slow", action="store_true", help="also `sequential` and `distill`")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    given.command = f"bench_export.py DATA --seeds {given.seeds} --tasks-of {given.tasks_of}{' --slow' * given.slow}"
    return given


def _seed(case: str, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    path = given.work / "measured" / f"{case.replace(' ', '-')}-{seed}.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    routed, plain = (trained(case, arm, seed, given.data, given.work) for arm in ("d2mora", "lora"))
    opened = open_run(routed)
    held_out = _held_out(opened)
    seconds = json.loads((routed / "seconds.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = {"seed": seed, "training_s": round(seconds["cpu"], 1)}
    found |= {"closed form / plain forward": _closed_form_cost(opened), "gate entropy": _entropies(opened, held_out)}
    for strategy in (*WHOLE, *(("sequential", "distill") if given.slow else ())):
        found[strategy] = _exported(opened, strategy, held_out, seconds["cpu"])
    if seed < given.tasks_of:
        found["per_task"] = {each: _by_task(opened, each) for each in ("core_lsq", "auto")}
    found["lora"] = measure(open_run(plain).model, {}, held_out).routed
    path.parent.mkdir(exist_ok=True)
    write_json(path, found)
    return found


def _held_out(opened: OpenRun) -> PaddedBatches:
    rows = sample_rows(opened, None).held_out
    return batches_of(opened, rows[:: max(1, round(len(rows) / HELD_OUT))])


def _exported(opened: OpenRun, strategy: str, held_out: PaddedBatches, training_s: float) -> dict[str, Any]:
    setting = strategy_inputs_of(opened, sample_rows(opened, None, STRATEGIES[strategy].share), None)
    began = time.process_time()
    statics = STRATEGIES[strategy].make(setting)
    spent = time.process_time() - began
    names = [task.name for task in opened.recipe.data.tasks]
    kept = _kept(measure(opened.model, statics, held_out, names))
    return kept | {"s": round(spent, 1), "time / training": round(spent / training_s, 3), "notes": setting.notes}


def _by_task(opened: OpenRun, strategy: str) -> dict[str, Any]:
    """One export for each task from its own rows, on its held-out rows; the gain kept over all tasks together."""
    kept, sums = {}, torch.zeros(3, dtype=torch.float64)
    for number, task in enumerate(opened.recipe.data.tasks):
        rows = sample_rows(opened, number, STRATEGIES["auto"].share)
        statics = STRATEGIES[strategy].make(strategy_inputs_of(opened, rows, None))
        found = measure(opened.model, statics, batches_of(opened, rows.held_out[:20]))
        kept[task.name] = found.gain_kept
        sums += found.tokens * torch.tensor([found.base, found.routed, found.merged], dtype=torch.float64)
    base, routed, merged = sums.tolist()
    return {"kept": (base - merged) / (base - routed), "tasks": kept}


def _closed_form_cost(opened: OpenRun) -> float:
    """Return the median ratio of CPU seconds, least squares with all it needs to the same rows' plain forward pass."""
    batches = list(batches_of(opened, sample_rows(opened, None).calibration))[:16]

    def plain() -> None:
        with torch.no_grad():
            for batch in batches:
                decode(opened.model, batch)

    def closed() -> None:
        _static(opened, batches)

    ratios = [_work(closed) / _work(plain) for _ in range(5)]
    return round(statistics.median(ratios[1:]), 3)


def _static(opened: OpenRun, batches: list[dict[str, torch.Tensor]]) -> Statics:
    moments = collect(opened.model, batches, with_mixing=False, weigh=balanced)
    return of_cores(opened.model, {name: core_lsq.mixing(each) for name, each in moments.items()})


def _work(function: Callable[[], None]) -> float:
    began = time.process_time()
    function()
    return time.process_time() - began


def _entropies(opened: OpenRun, batches: PaddedBatches) -> dict[str, list[float]]:
    """Return the mean entropy of each decoder layer's gates over a few rows, as a share of its maximum, by role."""
    sums: dict[str, dict[int, list[float]]] = {"down": {}, "up": {}}
    layers = mixture_layers(opened.model)

    def watcher(number: int, name: str) -> Callable[..., None]:
        def watch(u: torch.Tensor, v: torch.Tensor, small: dict[str, torch.Tensor]) -> None:
            for role, gating in layers[name].mixture_spec["default"].step.route(u.float(), small)[1].items():
                weight = gating.weight
                entropy = -(weight * weight.clamp_min(1e-9).log()).sum(-1).mean() / torch.tensor(weight.shape[-1]).log()
                sums[role].setdefault(number, []).append(float(entropy))

        return watch

    for name, layer in layers.items():
        number = int(next(part for part in name.split(".") if part.isdigit()))
        layer.watchers["default"] = watcher(number, name)
    with torch.no_grad():
        for number in range(0, len(batches), 4):
            decode(opened.model, batches[number])
    for layer in layers.values():
        layer.watchers.clear()
    return {role: [round(statistics.mean(each[n]), 3) for n in sorted(each)] for role, each in sums.items()}


def _kept(fidelity: Fidelity) -> dict[str, Any]:
    content = {"base": fidelity.base, "routed": fidelity.routed, "loss": fidelity.merged}
    content |= {"kl": fidelity.kl_per_token, "agreement": fidelity.agreement}
    tasks = {name: each.gain_kept and round(each.gain_kept, 4) for name, each in fidelity.tasks.items()}
    return {name: round(value, 5) for name, value in content.items()} | {"kept": fidelity.gain_kept, "tasks": tasks}


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return means over seeds with their intervals: of the gains kept, the costs, and the losses compared."""
    found: dict[str, Any] = {}
    for name in (*WHOLE, "sequential", "distill"):
        if all(name in run for run in runs):
            found[f"{name}: gain kept"] = interval([run[name]["kept"] for run in runs])
    by_task = [run["per_task"] for run in runs if "per_task" in run]
    for name in ("core_lsq", "auto") if by_task else ():
        found[f"per task, {name}: gain kept"] = interval([each[name]["kept"] for each in by_task])
    found["auto: time / training"] = interval([run["auto"]["time / training"] for run in runs])
    found["closed form / plain forward"] = interval([run["closed form / plain forward"] for run in runs])
    found["loss: routed"] = interval([run["auto"]["routed"] for run in runs])
    found["loss: export by auto"] = interval([run["auto"]["loss"] for run in runs])
    found["loss: lora trained directly"] = interval([run["lora"] for run in runs])
    found["loss: export minus lora"] = interval([run["auto"]["loss"] - run["lora"] for run in runs])
    return found


def interval(values: list[float]) -> dict[str, Any]:
    """Return the mean and its 95% interval, None where there is one value."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return {"mean": round(mean, 5), "interval": None}
    half = STUDENT[len(values) - 1] * statistics.stdev(values) / len(values) ** 0.5
    return {"mean": round(mean, 5), "interval": [round(mean - half, 5), round(mean + half, 5)]}


def _versions() -> dict[str, str]:
    names = ("torch", "transformers", "peft", "bitsandbytes")
    versions = {name: importlib.metadata.version(name) for name in names}
    load = f"{os.getloadavg()[1]:.1f} on {os.cpu_count()} cores"
    device = {"device": f"cpu {platform.machine()}, one thread", "load": load}
    return versions | device | {"date": datetime.now(UTC).date().isoformat()}


if __name__ == "__main__":
    main()
