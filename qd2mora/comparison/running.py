"""Running a comparison: split, match, sweep, train every arm with every seed, score, and go on after a kill."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qd2mora.base import load_tokenizer
from qd2mora.comparison.arm_scores import ArmScores, last_losses, score_best_export, score_trained
from qd2mora.comparison.arms_file import Wish
from qd2mora.comparison.comparison_folder import ComparisonFolder, found_once, remove_work
from qd2mora.comparison.forecast import steps_in_all
from qd2mora.comparison.matched_arms import Arm, matched_arms
from qd2mora.comparison.outcome import Comparison, TimedArm, outcome
from qd2mora.comparison.settings import ComparisonSettings
from qd2mora.comparison.split import split_tasks, testing
from qd2mora.comparison.trials import (
    Training,
    Trials,
    num_settings,
    recipe_of,
    seconds_a_step,
    seconds_by_the_clock,
    space_of,
    steps_done,
    train_through,
)
from qd2mora.comparison.tuning import Setting, Tuned, trainings_worth, tuned
from qd2mora.data import prepare
from qd2mora.disk.durable import write_json
from qd2mora.disk.lock import locked
from qd2mora.errors import InputRefused, NotFinite
from qd2mora.evaluation import Exam, ask_suite, check_exam
from qd2mora.merging.strategies import find_strategy
from qd2mora.mixture import MixtureConfig
from qd2mora.recipe import Recipe
from qd2mora.recipe.section import Section
from qd2mora.terminal.pace import Pace
from qd2mora.training import train

# None of the seeds that are scored, which count from 0: a rate is not chosen by the luck of a run that is told.
SWEEP_SEED = 1000
TIMING_STEPS = 4


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
    wishes: Mapping[str, Wish] | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Compare methods as the part says; return what `compare.json` holds. `wishes`: arms of a file, by name.

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
    arms = matched_arms(recipe, list(settings.methods), wishes, settings.targets)
    with locked(folder.lock, "--out"):
        return _compared(recipe, settings, arms, _begin(recipe, settings, arms, folder, overwrite, say))


def _compared(recipe: Recipe, settings: ComparisonSettings, arms: list[Arm], trials: Trials) -> Comparison:
    """Run what is not done yet, and write the outcome."""
    say = trials.say
    for arm in arms:
        _refuse_other(trials, arm)
        say("; ".join([f"{arm.name}: {arm.parameters:,} trainable parameters (rank {_rank(arm)})", *arm.notes]))
    trials = replace(trials, num_steps=_steps(trials, arms))
    total = steps_in_all(recipe, settings, arms, trials.num_steps)
    trials = replace(trials, pace=Pace("comparison, steps of all trainings", total, say))
    tunings = {arm.name: _tuned(trials, arm) for arm in arms}
    results: dict[str, list[ArmScores]] = {}
    for seed in range(settings.seeds):
        for arm in arms:
            setting = tunings[arm.name].setting
            say(f"{arm.name}, seed {seed}, rate {setting.name}")
            file = trials.folder.result(arm.name, f"seed-{seed}")
            is_known = file.is_file()
            training = Training(arm, seed, setting, trials.num_steps, trials.folder.run(arm.name, f"seed-{seed}"))
            scores = found_once(file, ArmScores, partial(_scored, trials, training, settings.export))
            results.setdefault(arm.name, []).append(scores)
            trials.trained(trials.num_steps, is_known=is_known)
    timed: dict[str, TimedArm] = {}
    if settings.equal_time and settings.seeds:
        timed = _at_equal_time(trials, arms, tunings)
    found = outcome(recipe, arms, tunings, results, trials.num_steps, timed)
    write_json(trials.folder.path / "compare.json", found.to_json())
    return found


def _refuse_other(trials: Trials, arm: Arm) -> None:
    """Refuse an arm that has results here as another one. Raises InputRefused."""
    now = json.loads(json.dumps({"adapter": arm.adapter.model_dump(mode="json"), "train": _plain(arm.train)}))
    before = found_once(trials.folder.result(arm.name, "arm"), dict[str, dict[str, object]], lambda: now)
    if before != now:
        changed = [key for key in ("adapter", "train") if before[key] != now[key]]
        raise InputRefused(
            f"--out: '{trials.folder.path}' holds another arm '{arm.name}' ({' and '.join(changed)} changed); give it "
            "another name, or name another folder"
        )


def _plain(settings: Mapping[str, object]) -> dict[str, object]:
    return {key: each.model_dump() if isinstance(each, Section) else each for key, each in settings.items()}


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
    asked = settings.scoring, settings.prompt
    return Exam(None, settings.suite, settings.data, settings.tasks, settings.limit, *asked)


def _steps(trials: Trials, arms: list[Arm]) -> int | None:
    """Return the steps of every run: the recipe's (None: by its epochs), or what fits the minutes."""
    if trials.settings.minutes is None:
        return trials.recipe.train.steps
    return found_once(trials.folder.path / "steps.json", TimedSteps, lambda: _timed_steps(trials, arms)).steps


def _timed_steps(trials: Trials, arms: list[Arm]) -> TimedSteps:
    settings, minutes = trials.settings, trials.settings.minutes or 0.0
    seconds = {arm.name: _seconds_of_a_step(trials, arm) for arm in arms}
    runs = {arm.name: settings.seeds + trainings_worth(*num_settings(settings, arm, trials.recipe)) for arm in arms}
    num_steps = int(minutes * 60 / sum(seconds[name] * number for name, number in runs.items()))
    if num_steps < 2:
        raise InputRefused(f"--minutes: {minutes:g} are too few for {len(arms)} arms; more, or fewer seeds")
    return TimedSteps(num_steps, seconds)


def _seconds_of_a_step(trials: Trials, arm: Arm) -> float:
    trials.say(f"{arm.name}: timing {TIMING_STEPS} steps")
    folder = trials.folder.run(arm.name, "timing")
    timing = Training(arm, SWEEP_SEED, Setting(trials.recipe.train.learning_rate), TIMING_STEPS, folder)
    train(recipe_of(trials.recipe, timing), overwrite=True)
    return seconds_by_the_clock(folder)


def _tuned(trials: Trials, arm: Arm) -> Tuned:
    """Return the setting whose run has the smallest mean loss on the rows to choose by, and how it was found."""
    settings = trials.settings
    steps = settings.sweep_steps or trials.num_steps
    found = tuned(space_of(settings, arm, trials.recipe), settings.tries, steps, partial(_loss_of, trials, arm))
    if found.rungs:
        told = f"{arm.name}: rate {found.setting.name}"
        if found.edges:
            told += f" ({', '.join(found.edges)} at the edge of the sweep: a wider one may help)"
        trials.say(told)
    return found


def _loss_of(trials: Trials, arm: Arm, setting: Setting, steps: int | None) -> float:
    """Return the mean loss of a setting over tasks, on the rows to choose by; infinite where training diverged."""
    name = f"sweep-{setting.name}"
    if trials.settings.tries is not None:
        name += f"-{steps}"
    file = trials.folder.result(arm.name, name)
    is_known = file.is_file()
    training = Training(arm, SWEEP_SEED, setting, steps, trials.folder.run(arm.name, name))
    by_task = found_once(file, dict[str, dict[str, float]], partial(_swept, trials, training))["losses"]
    # The losses are kept; runs of a sweep would fill the disk.
    remove_work(training.folder)
    trials.trained(steps, is_known=is_known)
    return sum(by_task.values()) / len(by_task) if by_task else math.inf


def _swept(trials: Trials, training: Training) -> dict[str, dict[str, float]]:
    """Train an arm at a setting of the sweep; return its `losses` by task on the rows to choose by, none if it blew."""
    steps = "" if training.steps is None else f", {training.steps} steps"
    trials.say(f"{training.arm.name}: trying rate {training.setting.name}{steps}")
    try:
        train_through(recipe_of(trials.recipe, training))
    except NotFinite as error:
        trials.say(f"{training.arm.name}: rate {training.setting.name} diverged: {error}")
        return {"losses": {}}
    return {"losses": last_losses(training.folder)}


def _scored(trials: Trials, training: Training, has_export: bool) -> ArmScores:
    """Train an arm with a seed and score it on the test rows, as trained and as its best static export."""
    folder, trained = training.folder, recipe_of(trials.recipe, training)
    train_through(trained)
    exam = _suite_exam(trials.settings)
    if exam.suite is None:
        whole = trained.model_copy(update={"data": trials.recipe.data})
        exam = replace(exam, recipe=testing(whole, trials.folder.path / "split"))
    scores = ArmScores(training.setting.rate, training.seed, score_trained(folder, exam))
    if has_export:
        scores = replace(scores, export=score_best_export(folder, exam, trials.settings.strategies))
    return scores


def _at_equal_time(trials: Trials, arms: list[Arm], tunings: dict[str, Tuned]) -> dict[str, TimedArm]:
    """Train every arm for as long as the first one's steps take, and score it; steps by what a step of each takes."""
    seconds = {arm.name: _measured_seconds(trials, arm) for arm in arms}
    steps = trials.num_steps or steps_done(trials.folder.run(arms[0].name, "seed-0"))
    found = {}
    for arm in arms:
        number = max(2, round(steps * seconds[arms[0].name] / seconds[arm.name]))
        results = []
        for seed in range(trials.settings.seeds):
            name = f"seed-{seed}" if arm is arms[0] else f"time-seed-{seed}"
            trials.say(f"{arm.name}, seed {seed}, as long as {arms[0].name}: {number} steps")
            training = Training(arm, seed, tunings[arm.name].setting, number, trials.folder.run(arm.name, name))
            file = trials.folder.result(arm.name, name)
            is_known = file.is_file()
            results.append(found_once(file, ArmScores, partial(_scored, trials, training, False)))
            if arm is not arms[0]:
                trials.trained(number, is_known=is_known)
        found[arm.name] = TimedArm(number, seconds[arm.name], results)
    return found


def _measured_seconds(trials: Trials, arm: Arm) -> float:
    file = trials.folder.result(arm.name, "seconds")
    folder = trials.folder.run(arm.name, "seed-0")
    return found_once(file, float, partial(seconds_a_step, folder))


def _rank(arm: Arm) -> str:
    words = [str(arm.adapter.rank or "its own")]
    for side, bank in (("down", arm.adapter.down), ("up", arm.adapter.up)):
        if bank is not None:
            words.append(f"{side} {bank.experts}")
    return ", ".join(words)


__all__ = ["compare"]
