"""The verb that asks and scores: eval."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from qd2mora.cli.app import MOST, AllowChanged, AsJson, ModelPath, app, words
from qd2mora.cli.groups import grouped
from qd2mora.cli.ways import Extract, GatesEvery, Samples, WayOptions
from qd2mora.errors import InputRefused
from qd2mora.terminal import Screen


@dataclass(frozen=True)
class QuestionOptions:
    """What is asked, and how the model is to answer it."""

    recipe: Annotated[Path | None, typer.Option(help="Recipe whose held-out rows are asked.")] = None
    suite: Annotated[str | None, typer.Option(help="Published tests to ask instead: commonsense.")] = None
    data: Annotated[Path | None, typer.Option(help="Folder of the suite's test files or of harness tasks.")] = None
    tasks: Annotated[str | None, typer.Option(help="Only these tasks, with commas between.")] = None
    scoring: Annotated[str, typer.Option(help="Of a suite: generate, or likelihood of the choices.")] = "generate"
    prompt: Annotated[str, typer.Option(help="Of a suite: published, training's own, or cloze.")] = "published"
    beams: Annotated[int, typer.Option(help="1 is greedy; the commonsense tables use 4.", min=1, max=1024)] = 1
    harness: Annotated[str | None, typer.Option(help="Tasks of lm-evaluation-harness, with commas.")] = None
    limit: Annotated[int | None, typer.Option(help="Rows of each task.", min=1, max=MOST)] = None
    rows_at_once: Annotated[int, typer.Option(help="Rows of a batch; no score depends on it.", min=1, max=MOST)] = 32


@dataclass(frozen=True)
class AgainstOptions:
    """What the model is measured beside; one of these at most."""

    against: Annotated[str | None, typer.Option(help="Change per task from this run or model; base: adapter off.")] = (
        None
    )
    sequence: Annotated[str | None, typer.Option(help="Earlier runs, in order, with commas: what each forgot.")] = None
    composite: Annotated[
        int | None, typer.Option(help="So many tasks in one prompt, held-out rows.", min=2, max=64)
    ] = None


@dataclass(frozen=True)
class DrawOptions:
    """How often an answer is drawn, and what of it counts."""

    samples: Samples = 1
    temperature: Annotated[float, typer.Option(help="Of --samples; else 0.7.")] = 0.0
    extract: Extract = None
    gates_every: GatesEvery = 1


@dataclass(frozen=True)
class OutputOptions:
    """Where scores go, and what may differ."""

    out: Annotated[Path | None, typer.Option(help="JSON file for the scores; the same command goes on.")] = None
    as_json: AsJson = False
    allow_changed: AllowChanged = None


@app.command(name="eval")
@grouped
def score(
    model: ModelPath,
    asking: QuestionOptions,
    others: AgainstOptions,
    beside: WayOptions,
    drawn: DrawOptions,
    told: OutputOptions,
) -> None:
    """Score tasks: held-out rows by their own metric, a published suite, or the harness's tasks."""
    from qd2mora.evaluation import EvalOptions, Exam

    way, tasks = beside.way(**asdict(drawn)), words(asking.tasks)
    exam = Exam(asking.recipe, asking.suite, asking.data, tasks, asking.limit, asking.scoring, asking.prompt, way)
    how = EvalOptions(asking.beams, asking.rows_at_once, told.out, told.allow_changed or (), is_shown=True)
    _ask(_Asked(str(model), exam, how, told.as_json), asking.harness, others)


@dataclass(frozen=True)
class _Asked:
    """What every way to ask takes."""

    model: str
    exam: Any
    how: Any
    as_json: bool

    def as_json_of(self, found: Mapping[str, Any]) -> bool:
        """Print results as JSON where that was asked for, and tell."""
        if self.as_json:
            typer.echo(json.dumps({name: each.to_json() for name, each in found.items()}, indent=1))
        return self.as_json


def _ask(asked: _Asked, harness: str | None, others: AgainstOptions) -> None:
    """Ask in the one way that was named. Raises InputRefused where several were."""
    told = [f"--{name}" for name, value in asdict(others).items() if value is not None]
    if len(told) > 1 or (harness is not None and told not in ([], ["--against"])):
        raise InputRefused(f"{told[-1]}: is asked alone; leave out {', '.join(told[:-1]) or '--harness'}")
    if harness is not None:
        _ask_harness(asked, words(harness), others.against)
    elif others.against is not None:
        _ask_against(asked, others.against)
    elif others.sequence is not None:
        _ask_sequence(asked, words(others.sequence))
    elif others.composite is not None:
        _ask_composite(asked, others.composite)
    else:
        _ask_alone(asked)


def _ask_alone(asked: _Asked) -> None:
    from qd2mora.evaluation import evaluate
    from qd2mora.report import show_scores

    scores = evaluate(asked.model, asked.exam, asked.how)
    if not asked.as_json_of(scores):
        show_scores({asked.model: scores}, Screen())


def _ask_harness(asked: _Asked, tasks: tuple[str, ...], against: str | None) -> None:
    if asked.exam.way is not None:
        raise InputRefused(
            "--contrast, --ensemble, --samples, --extract, --gates-every: the harness writes and reads by itself"
        )
    from qd2mora.evaluation.harness import harness_changes, run_harness
    from qd2mora.report import show_changes, show_harness

    exam, how = asked.exam, asked.how
    if against is not None:
        changes = harness_changes(asked.model, against, tasks, folder=exam.data, limit=exam.limit, how=how)
        if not asked.as_json_of(changes):
            show_changes(changes, against, Screen())
        return
    results = run_harness(asked.model, tasks, folder=exam.data, limit=exam.limit, how=how)
    if asked.as_json:
        typer.echo(json.dumps(results, indent=1))
    else:
        show_harness(results, Screen())


def _ask_against(asked: _Asked, against: str) -> None:
    from qd2mora.evaluation.change import evaluate_against
    from qd2mora.report import show_changes

    changes = evaluate_against(asked.model, against, asked.exam, asked.how)
    if not asked.as_json_of(changes):
        show_changes(changes, against, Screen())


def _ask_sequence(asked: _Asked, earlier: tuple[str, ...]) -> None:
    from qd2mora.evaluation.sequence import evaluate_sequence
    from qd2mora.report import show_sequence

    exam = asked.exam
    if exam.recipe is not None or exam.suite is not None or exam.way is not None or exam.tasks:
        raise InputRefused("--sequence: every run is asked the held-out rows of all; --limit and --out go with it")
    found = evaluate_sequence([*earlier, asked.model], exam.limit, asked.how)
    if asked.as_json:
        typer.echo(json.dumps(found.to_json(), indent=1))
    else:
        show_sequence(found, Screen())


def _ask_composite(asked: _Asked, number: int) -> None:
    from qd2mora.evaluation.composite import evaluate_composite
    from qd2mora.report import show_composite

    found = evaluate_composite(asked.model, asked.exam, number, asked.how)
    if not asked.as_json_of(found):
        show_composite(found, Screen())


__all__ = ["score"]
