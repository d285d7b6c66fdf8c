"""Running a comparison: split, match, sweep, train every arm with every seed, score, and go on after a kill.

Everything is a file in the comparison's folder: `plan.json` says what is compared, `split/` holds the rows, `runs/` the
runs, `results/` one file for each that is done, and `compare.json` the outcome. What is there is not done again.
"""

import json
import shutil
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from qd2mora.base import load_tokenizer
from qd2mora.comparison.arm import Exam, best_export, last_losses, score_run
from qd2mora.comparison.match import Arm, matched_arms
from qd2mora.comparison.outcome import Comparison, outcome
from qd2mora.comparison.split import split_tasks, testing
from qd2mora.data import prepare
from qd2mora.disk.durable import write_json
from qd2mora.errors import InputRefused
from qd2mora.evaluation import ask_suite, suite_task_names
from qd2mora.merging.strategies import find_strategy
from qd2mora.mixture import MixtureConfig
from qd2mora.recipe import Recipe
from qd2mora.run_folder import RunFolder, is_run, refuse_taken
from qd2mora.training import train

SWEEP_SEED = 1000
TIMING_STEPS = 4


@dataclass(frozen=True)
class Wishes:
    """What is asked of a comparison.

    methods: the first is what the others are compared with. seeds: runs of each; 0 stops after the sweep. rates: the
    learning rates that every arm tries; the recipe's alone: no sweep. sweep_steps: of a run of the sweep, as many as of
    the others where None. minutes: time for all training that is left to do; steps follow from it, equal for all arms.
    choose_rows: rows of each task apart from training and test, to choose rate and export by. strategies: exports
    tried. export: score each run's best static export too. suite: test on its files in the folder `data`, of `tasks` or
    of all, not on the recipe's held-out rows. limit: test rows of each task.
    """

    methods: tuple[str, ...]
    seeds: int = 3
    rates: tuple[float, ...] = ()
    sweep_steps: int | None = None
    minutes: float | None = None
    choose_rows: int = 100
    strategies: tuple[str, ...] = ()
    export: bool = True
    limit: int | None = None
    suite: str | None = None
    data: str | None = None
    tasks: tuple[str, ...] = ()
    scoring: str = "generate"


def compare(
    recipe: Recipe,
    wishes: Wishes,
    out: Path,
    *,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Compare methods as the module says; return what `compare.json` holds.

    Raises InputRefused, also where `out` holds another comparison (unless `overwrite`), and what training raises; a
    comparison stopped on the way goes on when it is started again.
    """
    if len(set(wishes.methods)) < len(wishes.methods) or not wishes.methods:
        raise InputRefused(f"--methods: {', '.join(wishes.methods) or 'none'} will not do: different ones, with commas")
    for name in wishes.strategies:
        find_strategy(name)
    arms = matched_arms(recipe, list(wishes.methods))
    tokenizer = load_tokenizer(recipe.base.model)
    _check_suite(recipe, wishes, arms, tokenizer)
    plan = {"recipe": recipe.deciding() | {"output": None}, "wishes": _lasting(wishes)}
    is_new = _open(out, plan, overwrite)
    try:
        prepare(recipe.data, tokenizer, recipe.train.seed)  # names a bad row by the file it is in, not by the split's
        learning = split_tasks(recipe, out / "split", wishes.choose_rows, has_test=wishes.suite is None)
    except InputRefused:
        if is_new:  # what was refused is not begun: other wishes may take the folder
            shutil.rmtree(out)
        raise
    for arm in arms:
        say(f"{arm.name}: {arm.parameters:,} trainable parameters (rank {_rank(arm)})")
    num_steps = _steps(learning, wishes, arms, out, say)
    rates = {arm.name: _best_rate(learning, wishes, arm, num_steps, out, say) for arm in arms}
    results: dict[str, list[dict[str, Any]]] = {}
    for seed in range(wishes.seeds):
        for arm in arms:
            say(f"{arm.name}, seed {seed}, rate {rates[arm.name]['rate']:g}")
            done = _seed_result(learning, wishes, arm, seed, rates[arm.name]["rate"], num_steps, out)
            results.setdefault(arm.name, []).append(done)
    described = [asdict(arm) | {"adapter": arm.adapter.model_dump(exclude_none=True)} for arm in arms]
    found = outcome(recipe, described, rates, results, num_steps)
    write_json(out / "compare.json", found.to_json())
    return found


def _check_suite(recipe: Recipe, wishes: Wishes, arms: list[Arm], tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a suite that cannot be asked, before anything is trained. Raises InputRefused."""
    if wishes.suite is None:
        if wishes.data is not None or wishes.tasks:
            raise InputRefused("--data and --tasks: they are a suite's; name it with --suite")
        return
    names = suite_task_names(wishes.suite, wishes.tasks)
    if wishes.data is None:
        raise InputRefused(f"--data: say in which folder the test files of {wishes.suite} are")
    ask_suite(wishes.suite, Path(wishes.data), tokenizer, scoring=wishes.scoring, only=names, limit=wishes.limit)
    known = [task.name for task in recipe.data.tasks]
    for arm in arms:
        unknown = [name for name in names if name not in known]
        if unknown and MixtureConfig.from_recipe(arm.adapter, len(known)).reads_task and len(known) > 1:
            raise InputRefused(
                f"--suite: {arm.name} routes by task and would not be trained on '{unknown[0]}'; the recipe's tasks "
                f"are {', '.join(known)}: choose with --tasks"
            )


def _lasting(wishes: Wishes) -> dict[str, Any]:
    """What must stay the same for a comparison to go on; more seeds and more arms may be added."""
    content = json.loads(json.dumps(asdict(wishes)))
    for name in ("methods", "seeds", "minutes"):
        del content[name]
    return dict(content)


def _open(out: Path, plan: dict[str, Any], overwrite: bool) -> bool:
    """Begin a comparison's folder, or see that it is of this one; tell which."""
    file = out / "plan.json"
    if overwrite and file.is_file():
        shutil.rmtree(out)
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        changed = [key for key in ("recipe", "wishes") if before[key] != json.loads(json.dumps(plan[key]))]
        if changed:
            raise InputRefused(
                f"--out: '{out}' holds another comparison ({' and '.join(changed)} changed); name another folder, or "
                "start anew with --overwrite"
            )
        return False
    refuse_taken(out, "--out")
    out.mkdir(parents=True, exist_ok=True)
    write_json(file, plan)
    return True


def _steps(recipe: Recipe, wishes: Wishes, arms: list[Arm], out: Path, say: Callable[[str], None]) -> int | None:
    """Return the steps of every run: the recipe's (None: by its epochs), or what fits the minutes."""
    if wishes.minutes is None:
        return recipe.train.steps
    file = out / "steps.json"
    if not file.is_file():
        seconds = {}
        for arm in arms:
            say(f"{arm.name}: timing {TIMING_STEPS} steps")
            folder = out / "runs" / arm.name / "timing"
            train(_recipe_of(recipe, arm, SWEEP_SEED, recipe.train.learning_rate, TIMING_STEPS, folder), overwrite=True)
            lines = [json.loads(line) for line in RunFolder(folder).metrics.read_text(encoding="utf-8").splitlines()]
            taken = [line["tokens"] / line["tokens_per_s"] for line in lines if "tokens_per_s" in line]
            seconds[arm.name] = statistics.median(taken)
        sweep = len(wishes.rates) if len(wishes.rates) > 1 else 0
        num_steps = int(wishes.minutes * 60 / (sum(seconds.values()) * (sweep + wishes.seeds)))
        if num_steps < 2:
            raise InputRefused(f"--minutes: {wishes.minutes:g} are too few for {len(arms)} arms; more, or fewer seeds")
        write_json(file, {"steps": num_steps, "seconds_a_step": seconds})
    return int(json.loads(file.read_text(encoding="utf-8"))["steps"])


def _best_rate(
    recipe: Recipe, wishes: Wishes, arm: Arm, num_steps: int | None, out: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """Return the rate whose run has the smallest mean loss on the rows to choose by, and every rate's loss."""
    rates = wishes.rates or (recipe.train.learning_rate,)
    if len(rates) == 1:
        return {"rate": rates[0], "losses": {}}
    losses = {}
    for rate in rates:
        file = out / "results" / arm.name / f"sweep-{rate:g}.json"
        if not file.is_file():
            say(f"{arm.name}: trying rate {rate:g}")
            folder = out / "runs" / arm.name / f"sweep-{rate:g}"
            steps = wishes.sweep_steps or num_steps
            _train_through(_recipe_of(recipe, arm, SWEEP_SEED, rate, steps, folder))
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, {"losses": last_losses(folder)})
            shutil.rmtree(folder)
        by_task = json.loads(file.read_text(encoding="utf-8"))["losses"]
        losses[f"{rate:g}"] = sum(by_task.values()) / len(by_task)
    best = min(losses, key=lambda name: losses[name])
    at_edge = float(best) in (min(rates), max(rates)) and len(rates) > 1
    say(f"{arm.name}: rate {best}" + (" (at the edge of the sweep: a wider one may help)" if at_edge else ""))
    return {"rate": float(best), "losses": losses, "at_edge": at_edge}


def _seed_result(
    recipe: Recipe, wishes: Wishes, arm: Arm, seed: int, rate: float, num_steps: int | None, out: Path
) -> dict[str, Any]:
    """Train an arm with a seed and score it on the test rows, as trained and as its best static export."""
    file = out / "results" / arm.name / f"seed-{seed}.json"
    if file.is_file():
        return dict(json.loads(file.read_text(encoding="utf-8")))
    folder = out / "runs" / arm.name / f"seed-{seed}"
    trained = _recipe_of(recipe, arm, seed, rate, num_steps, folder)
    _train_through(trained)
    whole = trained.model_copy(update={"data": recipe.data})
    asked = whole if wishes.suite else testing(whole, out / "split")
    exam = Exam(asked, wishes.limit, wishes.suite, wishes.data, wishes.tasks, wishes.scoring)
    result: dict[str, Any] = {"rate": rate, "seed": seed, "trained": score_run(folder, exam)}
    if wishes.export:
        result["export"] = best_export(folder, exam, wishes.strategies)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, result)
    return result


def _train_through(recipe: Recipe) -> None:
    """Train, or go on where an earlier start was stopped; a run that is finished stays as it is."""
    folder = RunFolder(Path(recipe.output))
    if not (folder.adapter / "adapter_model.safetensors").is_file():
        train(recipe, resume=is_run(folder.path))


def _recipe_of(recipe: Recipe, arm: Arm, seed: int, rate: float, num_steps: int | None, folder: Path) -> Recipe:
    changes: dict[str, Any] = {"seed": seed, "learning_rate": rate}
    if num_steps is not None:
        changes |= {"steps": num_steps, "epochs": None}
        changes["warmup_steps"] = min(recipe.train.warmup_steps, num_steps // 10)
    settings = recipe.train.model_copy(update=changes)
    content: dict[str, Any] = {"adapter": arm.adapter, "train": settings, "output": str(folder)}
    if settings.early_stopping is None and settings.final == "last":
        # The rows to choose by are judged by their loss: scoring them too would only cost time.
        tasks = [task.model_copy(update={"metric": None}) for task in recipe.data.tasks]
        content["data"] = recipe.data.model_copy(update={"tasks": tasks})
    return recipe.model_copy(update=content)


def _rank(arm: Arm) -> str:
    experts = {side: bank.experts for side in ("down", "up") if (bank := getattr(arm.adapter, side)) is not None}
    return ", ".join([str(arm.adapter.rank or "its own"), *(f"{side} {number}" for side, number in experts.items())])


__all__ = ["Comparison", "Wishes", "compare"]
