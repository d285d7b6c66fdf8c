"""What is asked: tasks of a recipe or of a suite as rows with right answers, and what makes an answer right."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qd2mora.data import Row, TaskRows, encode, prepare
from qd2mora.errors import InputRefused
from qd2mora.evaluation.judging import METRICS, Judge, judge_of
from qd2mora.evaluation.subject import Subject
from qd2mora.evaluation.suites import PROMPTS, extracted, find_suite, read_items, suite_task_names
from qd2mora.evaluation.ways import Way
from qd2mora.recipe import Recipe

MOST_CHOICES = 64
SCORINGS = ("generate", "likelihood")


@dataclass(frozen=True)
class Exam:
    """What a model is asked: held-out rows of a recipe (or of its file), or the test files of a suite in `data`.

    tasks: those to ask, all where empty; limit: rows of each. Of a suite, scoring: what is written counts (generate),
    or the likelihood of the choices; prompt: the published one, the one of the instruction format (training), or the
    question alone, with the choices' own words weighed (cloze).
    """

    recipe: Recipe | Path | None = None
    suite: str | None = None
    data: str | Path | None = None
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    scoring: str = "generate"
    prompt: str = "published"
    way: Way | None = None
    """How answers are written where not greedily; its `extract` says what counts of answers to held-out rows."""


@dataclass(frozen=True)
class AskedTask:
    """A task to ask. `labels`: what is right, a row each; `choices`: the texts to weigh, a row each, where they are.

    `metric`: `exact`, the written words are the right ones; `extract`, the first match of `pattern` in what is written
    is; `choice`, the right choice is the likeliest; `rouge`, ROUGE-L of what is written; `loss`, nothing is written;
    `preferred` and `rated`, answers are compared by the run's objective.
    """

    name: str
    metric: str
    rows: list[Row]
    labels: list[str]
    max_new_tokens: int
    choices: list[tuple[str, ...]] = field(default_factory=list)
    pattern: str = ""
    way: Way | None = None
    judge: Judge | None = None
    """What judges answers that are there, for the metrics `preferred` and `rated`."""


def ask_held_out(tasks: list[TaskRows], limit: int | None = None) -> list[AskedTask]:
    """Return the held-out rows of every task that is asked for answers, the first `limit` of each, by its own metric.

    Raises InputRefused where a task of choices has too many different answers to be one.
    """
    asked = []
    for task in tasks:
        rows, metric = list(task.validation[:limit]), task.task.judged_by
        if not rows or task.task.format in METRICS:
            continue
        choices: tuple[str, ...] = ()
        if metric == "choice":
            choices = _answers_of(task)
        # One token more than the longest answer tells that an answer goes on; the end token is the other.
        longest = max(len(row.ids) - row.masked for row in rows) + 2
        labels = [row.pair.answer for row in rows]
        asked.append(AskedTask(task.task.name, metric, rows, labels, longest, [choices] * len(rows)))
    return asked


def ask_judged(recipe: Recipe, tasks: list[TaskRows], subject: Subject, limit: int | None = None) -> list[AskedTask]:
    """Return the held-out rows of every task whose answers are judged, by the objective of a recipe."""
    asked = []
    for task in tasks:
        rows, metric = list(task.validation[:limit]), METRICS.get(task.task.format)
        if not rows or metric is None:
            continue
        judge = judge_of(recipe, subject, rows)
        if judge is not None:
            labels = [row.pair.answer for row in rows]
            asked.append(AskedTask(task.task.name, metric, rows, labels, 0, judge=judge))
    return asked


def ask_suite(
    exam: Exam, tokenizer: PreTrainedTokenizerBase, numbers: Mapping[str, int] | None = None
) -> list[AskedTask]:
    """Return the tasks of an exam's suite; `numbers` gives each the task number that routers read.

    Raises InputRefused where a file or an answer is missing.
    """
    assert exam.suite is not None and exam.data is not None
    suite, names = find_suite(exam.suite), suite_task_names(exam.suite, exam.tasks)
    numbers, asked = numbers or {}, []
    for task in suite.tasks:
        if task.name not in names:
            continue
        items = read_items(suite, task, Path(exam.data), exam.prompt, exam.limit)
        # The right answer's end is never cut: what a suite asks is short.
        rows = encode([item.pair for item in items], tokenizer, numbers.get(task.name, 0), 1 << 20, True)
        metric, labels, texts = "extract", [item.label for item in items], []
        if exam.scoring == "likelihood":
            metric, labels = "choice", [item.pair.answer for item in items]
            texts = [item.texts for item in items]
        asked.append(AskedTask(task.name, metric, rows, labels, suite.max_new_tokens, texts, task.pattern))
    return asked


def ask(exam: Exam, subject: Subject) -> list[AskedTask]:
    """Return the tasks of an exam as a subject is asked them.

    Raises InputRefused where there is nothing to ask, an answer is missing, or a task is unknown to an adapter that
    routes by task.
    """
    if exam.suite is not None:
        numbers = task_numbers(subject, suite_task_names(exam.suite, exam.tasks))
        asked = ask_suite(exam, subject.tokenizer, numbers)
    else:
        assert isinstance(exam.recipe, Recipe)
        if subject.reads_spans and subject.run is not None:
            known = subject.run.recipe.data.spans
            if exam.recipe.data.spans != known:
                raise InputRefused(
                    f"data.spans: {exam.recipe.data.spans}, but this run's adapters are {known}, in order"
                )
        clock = None if subject.run is None else subject.run.clock
        tasks = prepare(exam.recipe.data, subject.tokenizer, exam.recipe.train.seed, clock)
        tasks = _numbered(_chosen(tasks, exam.tasks), subject)
        asked = ask_held_out(tasks, exam.limit) + ask_judged(exam.recipe, tasks, subject, exam.limit)
    if not asked:
        raise InputRefused("no task of the recipe holds out rows; set data.tasks.0.validation=200")
    return asked if exam.way is None else _in_way(asked, exam.way)


def _in_way(asked: list[AskedTask], way: Way) -> list[AskedTask]:
    """Return the tasks as they are written and read out in a way of one's own. Raises InputRefused."""
    if way.extract is not None:
        asked = [_read_out(task, way.extract) if task.metric == "exact" else task for task in asked]
    if way.is_plain:
        return asked
    if way.ensemble is None and all(task.metric in ("choice", "loss") for task in asked):
        raise InputRefused("--contrast, --samples: no task of these writes an answer: choices and losses are weighed")
    return [replace(task, way=way) for task in asked]


def _read_out(task: AskedTask, pattern: str) -> AskedTask:
    labels = [extracted(pattern, label) for label in task.labels]
    if not all(labels):
        row = labels.index("")
        raise InputRefused(f"--extract: row {row + 1} of task {task.name} has no match: '{task.labels[row][:60]}'")
    return replace(task, metric="extract", labels=labels, pattern=pattern)


def check_exam(exam: Exam) -> None:
    """Refuse an exam that cannot be asked of any model. Raises InputRefused."""
    if exam.suite is not None and exam.recipe is not None:
        raise InputRefused("give --suite or --recipe, not both")
    if exam.scoring not in SCORINGS:
        raise InputRefused(f"--scoring: '{exam.scoring}' will not do: {' or '.join(SCORINGS)}")
    if exam.prompt not in PROMPTS:
        raise InputRefused(f"--prompt: '{exam.prompt}' will not do: {' or '.join(PROMPTS)}")
    if exam.prompt == "cloze" and exam.scoring != "likelihood":
        raise InputRefused("--prompt: cloze weighs the choices' own words; give --scoring likelihood with it")
    if exam.way is not None and exam.way.extract is not None and exam.suite is not None:
        raise InputRefused("--extract: a suite's tasks have patterns of their own; it goes with a recipe's rows")
    if exam.suite is None:
        if exam.scoring != "generate":
            raise InputRefused("--scoring: a recipe's tasks say it themselves: data.tasks.0.metric=choice")
        return
    find_suite(exam.suite)
    if exam.data is None:
        raise InputRefused(f"--data: say in which folder the test files of {exam.suite} are")


def task_numbers(subject: Subject, names: list[str]) -> dict[str, int]:
    """Return the number by which a run that routes by task knows each task, by name. Raises InputRefused."""
    if subject.run is None or not subject.run.routers.reads_task:
        return {}
    known = [task.name for task in subject.run.recipe.data.tasks]
    unknown = [name for name in names if name not in known]
    if unknown and len(known) > 1:
        raise InputRefused(
            f"this adapter routes by task and was not trained on '{unknown[0]}'; its tasks are {', '.join(known)}: "
            "choose with --tasks"
        )
    return dict.fromkeys(names, 0) | {name: known.index(name) for name in names if name in known}


def _chosen(tasks: list[TaskRows], names: Collection[str]) -> list[TaskRows]:
    known = [task.task.name for task in tasks]
    for name in names:
        if name not in known:
            raise InputRefused(f"--tasks: no task '{name}' in this recipe; there are {', '.join(known)}")
    return [task for task in tasks if not names or task.task.name in names]


def _numbered(tasks: list[TaskRows], subject: Subject) -> list[TaskRows]:
    """Give held-out rows the task numbers of the run: another recipe may list its tasks in another order."""
    numbers = task_numbers(subject, [task.task.name for task in tasks if task.validation])
    if not numbers:
        return tasks
    return [
        replace(task, validation=[row.of_task(numbers[task.task.name]) for row in task.validation])
        if task.validation
        else task
        for task in tasks
    ]


def _answers_of(task: TaskRows) -> tuple[str, ...]:
    """Return a task's different answers, in alphabetical order: its choices."""
    answers = {row.pair.answer for row in (*task.train, *task.validation)}
    if len(answers) > MOST_CHOICES:
        raise InputRefused(
            f"data.tasks.{task.task.name}.metric: choice weighs every answer that occurs, here {len(answers)} "
            f"(limit {MOST_CHOICES}); exact or rouge"
        )
    return tuple(sorted(answers))


__all__ = [
    "MOST_CHOICES",
    "SCORINGS",
    "AskedTask",
    "Exam",
    "ask",
    "ask_held_out",
    "ask_judged",
    "ask_suite",
    "check_exam",
    "task_numbers",
]
