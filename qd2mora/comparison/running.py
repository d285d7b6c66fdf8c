"""Running a comparison: split, match, sweep, train every arm with every seed, score, and go on after a kill."""

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qd2mora.base import load_tokenizer
from qd2mora.comparison.arm_scores import ArmScores, last_losses, score_best_export, score_trained
from qd2mora.comparison.comparison_folder import ComparisonFolder, found_once, remove_work
from qd2mora.comparison.forecast import steps_in_all
from qd2mora.comparison.matched_arms import Arm, matched_arms
from qd2mora.comparison.outcome import Comparison, SweptRate, outcome
from qd2mora.comparison.settings import ComparisonSettings
from qd2mora.comparison.split import split_tasks, testing
from qd2mora.data import prepare
from qd2mora.disk.durable import write_json
from qd2mora.disk.lock import locked
from qd2mora.errors import InputRefused
from qd2mora.evaluation import Exam, ask_suite, check_exam
from qd2mora.merging.strategies import find_strategy
from qd2mora.mixture import MixtureConfig
from qd2mora.recipe import Recipe
from qd2mora.run_folder import RunFolder, is_run
from qd2mora.terminal.pace import Pace
from qd2mora.training import train

SWEEP_SEED = 1000
TIMING_STEPS = 4


@dataclass(frozen=True)
class Trials:
    """A comparison under way: `recipe` learns from its split; `num_steps` of a run, the recipe's epochs where None."""

    recipe: Recipe
    settings: ComparisonSettings
    folder: ComparisonFolder
    say: Callable[[str], None]
    num_steps: int | None = None
    pace: Pace | None = None
    """Counts the steps of all trainings."""

    def trained(self, steps: int | None, *, is_known: bool) -> None:
        """Count a training, of an earlier start or of this one."""
        if self.pace is not None:
            self.pace.advance(steps or 1, is_known=is_known)


@dataclass(frozen=True)
class TimedSteps:
    """How many steps fit the time, from how long one takes each arm."""

    steps: int
    seconds_a_step: dict[str, float]


def compare(
    recipe: Recipe,
    settings: ComparisonSettings,
    out: Path,
    *,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Compare methods as the part says; return what `compare.json` holds.

    Raises InputRefused, also where `out` holds another comparison (unless `overwrite`), and what training raises; a
    comparison stopped on the way goes on when it is started again.
    """
    if len(set(settings.methods)) < len(settings.methods) or not settings.methods:
        given = ", ".join(settings.methods) or "none"
        raise InputRefused(f"--methods: {given} will not do: different ones, with commas")
    for name in settings.strategies:
        find_strategy(name)
    folder = ComparisonFolder(out)
    folder.check(overwrite)
    arms = matched_arms(recipe, list(settings.methods))
    with locked(folder.lock, "--out"):
        return _compared(recipe, settings, arms, _begin(recipe, settings, arms, folder, overwrite, say))


def _compared(recipe: Recipe, settings: ComparisonSettings, arms: list[Arm], trials: Trials) -> Comparison:
    """Run what is not done yet, and write the outcome."""
    say = trials.say
    for arm in arms:
        say(f"{arm.name}: {arm.parameters:,} trainable parameters (rank {_rank(arm)})")
    trials = replace(trials, num_steps=_steps(trials, arms))
    total = steps_in_all(recipe, settings, arms, trials.num_steps)
    trials = replace(trials, pace=Pace("comparison, steps of all trainings", total, say))
    rates = {arm.name: _best_rate(trials, arm) for arm in arms}
    results: dict[str, list[ArmScores]] = {}
    for seed in range(settings.seeds):
        for arm in arms:
            say(f"{arm.name}, seed {seed}, rate {rates[arm.name].rate:g}")
            file = trials.folder.result(arm.name, f"seed-{seed}")
            is_known = file.is_file()
            scores = found_once(file, ArmScores, partial(_scored, trials, arm, seed, rates[arm.name].rate))
            results.setdefault(arm.name, []).append(scores)
            trials.trained(trials.num_steps, is_known=is_known)
    found = outcome(recipe, arms, rates, results, trials.num_steps)
    write_json(trials.folder.path / "compare.json", found.to_json())
    return found


def _begin(
    recipe: Recipe,
    settings: ComparisonSettings,
    arms: list[Arm],
    folder: ComparisonFolder,
    overwrite: bool,
    say: Callable[[str], None],
) -> Trials:
    """Refuse what cannot be compared, and split the rows. Raises InputRefused."""
    tokenizer = load_tokenizer(recipe.base.model)
    _check_suite(recipe, settings, arms, tokenizer)
    plan = {"recipe": recipe.deciding() | {"output": None}, "wishes": settings.lasting()}
    is_new = folder.begin(plan, overwrite)
    try:
        prepare(recipe.data, tokenizer, recipe.train.seed)  # names a bad row by the file it is in, not by the split's
        learning = split_tasks(recipe, folder.path / "split", settings.choose_rows, has_test=settings.suite is None)
    except InputRefused:
        if is_new:  # what was refused is not begun: other settings may take the folder
            folder.withdraw()
        raise
    return Trials(learning, settings, folder, say)


def _check_suite(
    recipe: Recipe, settings: ComparisonSettings, arms: list[Arm], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Refuse a suite that cannot be asked, before anything is trained. Raises InputRefused."""
    if settings.suite is None:
        if settings.data is not None or settings.tasks:
            raise InputRefused("--data and --tasks: they are a suite's; name it with --suite")
        return
    exam = _suite_exam(settings)
    check_exam(exam)
    names = [task.name for task in ask_suite(exam, tokenizer)]
    known = [task.name for task in recipe.data.tasks]
    unknown = [name for name in names if name not in known]
    for arm in arms:
        if unknown and MixtureConfig.from_recipe(arm.adapter, len(known)).routers.reads_task and len(known) > 1:
            raise InputRefused(
                f"--suite: {arm.name} routes by task and would not be trained on '{unknown[0]}'; the recipe's tasks "
                f"are {', '.join(known)}: choose with --tasks"
            )


def _suite_exam(settings: ComparisonSettings) -> Exam:
    return Exam(None, settings.suite, settings.data, settings.tasks, settings.limit, settings.scoring)


def _steps(trials: Trials, arms: list[Arm]) -> int | None:
    """Return the steps of every run: the recipe's (None: by its epochs), or what fits the minutes."""
    if trials.settings.minutes is None:
        return trials.recipe.train.steps
    return found_once(trials.folder.path / "steps.json", TimedSteps, lambda: _timed_steps(trials, arms)).steps


def _timed_steps(trials: Trials, arms: list[Arm]) -> TimedSteps:
    minutes, num_runs = trials.settings.minutes or 0.0, trials.settings.seeds
    if len(trials.settings.rates) > 1:
        num_runs += len(trials.settings.rates)
    seconds = {arm.name: _seconds_of_a_step(trials, arm) for arm in arms}
    num_steps = int(minutes * 60 / (sum(seconds.values()) * num_runs))
    if num_steps < 2:
        raise InputRefused(f"--minutes: {minutes:g} are too few for {len(arms)} arms; more, or fewer seeds")
    return TimedSteps(num_steps, seconds)


def _seconds_of_a_step(trials: Trials, arm: Arm) -> float:
    trials.say(f"{arm.name}: timing {TIMING_STEPS} steps")
    folder = trials.folder.run(arm.name, "timing")
    timed = replace(trials, num_steps=TIMING_STEPS)
    train(_recipe_of(timed, arm, SWEEP_SEED, trials.recipe.train.learning_rate, folder), overwrite=True)
    lines = [json.loads(line) for line in RunFolder(folder).metrics.read_text(encoding="utf-8").splitlines()]
    # The median: the first step also compiles, allocates and reads.
    return statistics.median(line["tokens"] / line["tokens_per_s"] for line in lines if "tokens_per_s" in line)


def _best_rate(trials: Trials, arm: Arm) -> SweptRate:
    """Return the rate whose run has the smallest mean loss on the rows to choose by, and every rate's loss."""
    rates = trials.settings.rates or (trials.recipe.train.learning_rate,)
    if len(rates) == 1:
        return SweptRate(rates[0], {}, False)
    losses = {}
    for rate in rates:
        file = trials.folder.result(arm.name, f"sweep-{rate:g}")
        is_known = file.is_file()
        by_task = found_once(file, dict[str, dict[str, float]], partial(_swept, trials, arm, rate))["losses"]
        # The losses are kept; runs of a sweep would fill the disk.
        remove_work(trials.folder.run(arm.name, f"sweep-{rate:g}"))
        losses[f"{rate:g}"] = sum(by_task.values()) / len(by_task)
        trials.trained(trials.settings.sweep_steps or trials.num_steps, is_known=is_known)
    best = min(losses, key=lambda name: losses[name])
    at_edge = float(best) in (min(rates), max(rates))
    told = f"{arm.name}: rate {best}"
    if at_edge:
        told += " (at the edge of the sweep: a wider one may help)"
    trials.say(told)
    return SweptRate(float(best), losses, at_edge)


def _swept(trials: Trials, arm: Arm, rate: float) -> dict[str, dict[str, float]]:
    """Train an arm at a rate of the sweep; return its `losses` by task on the rows to choose by."""
    trials.say(f"{arm.name}: trying rate {rate:g}")
    folder = trials.folder.run(arm.name, f"sweep-{rate:g}")
    shorter = replace(trials, num_steps=trials.settings.sweep_steps or trials.num_steps)
    _train_through(_recipe_of(shorter, arm, SWEEP_SEED, rate, folder))
    return {"losses": last_losses(folder)}


def _scored(trials: Trials, arm: Arm, seed: int, rate: float) -> ArmScores:
    """Train an arm with a seed and score it on the test rows, as trained and as its best static export."""
    folder = trials.folder.run(arm.name, f"seed-{seed}")
    trained = _recipe_of(trials, arm, seed, rate, folder)
    _train_through(trained)
    exam = _suite_exam(trials.settings)
    if exam.suite is None:
        whole = trained.model_copy(update={"data": trials.recipe.data})
        exam = replace(exam, recipe=testing(whole, trials.folder.path / "split"))
    scores = ArmScores(rate, seed, score_trained(folder, exam))
    if trials.settings.export:
        scores = replace(scores, export=score_best_export(folder, exam, trials.settings.strategies))
    return scores


def _train_through(recipe: Recipe) -> None:
    """Train, or go on where an earlier start was stopped; a run that is finished stays as it is."""
    folder = RunFolder(Path(recipe.output))
    if not (folder.adapter / "adapter_model.safetensors").is_file():
        train(recipe, resume=is_run(folder.path))


def _recipe_of(trials: Trials, arm: Arm, seed: int, rate: float, folder: Path) -> Recipe:
    recipe = trials.recipe
    changes: dict[str, object] = {"seed": seed, "learning_rate": rate}
    if trials.num_steps is not None:
        changes |= {"steps": trials.num_steps, "epochs": None}
        changes["warmup_steps"] = min(recipe.train.warmup_steps, trials.num_steps // 10)
    settings = recipe.train.model_copy(update=changes)
    content: dict[str, object] = {"adapter": arm.adapter, "train": settings, "output": str(folder)}
    if settings.early_stopping is None and settings.final == "last":
        # The rows to choose by are judged by their loss: scoring them too would only cost time.
        tasks = [task.model_copy(update={"metric": None}) for task in recipe.data.tasks]
        content["data"] = recipe.data.model_copy(update={"tasks": tasks})
    return recipe.model_copy(update=content)


def _rank(arm: Arm) -> str:
    words = [str(arm.adapter.rank or "its own")]
    for side, bank in (("down", arm.adapter.down), ("up", arm.adapter.up)):
        if bank is not None:
            words.append(f"{side} {bank.experts}")
    return ", ".join(words)


__all__ = ["compare"]
