"""What a run folder holds, read for a report: whatever is missing or damaged is left out and named."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter

from qd2mora.evaluation.samples import Sample
from qd2mora.inspection import RoutingReport, likeness_line, read_routing
from qd2mora.memory.reasons import Choice
from qd2mora.recipe import Recipe
from qd2mora.run_folder import RunFolder, read_recipe

Content = TypeVar("Content")
ByTask = dict[str, float | None]


@dataclass(frozen=True)
class LoggedStep:
    """A training step's line of `metrics.jsonl`; memory in bytes, None is not finite or not measured."""

    step: int
    loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens: int | None = None
    tokens_per_s: float | None = None
    memory: int | None = None
    bad_steps: int = 0
    penalty_down: float | None = None
    penalty_up: float | None = None


@dataclass(frozen=True)
class LoggedEvaluation:
    """An evaluation's line of `metrics.jsonl`, by task; `alarm`: what is wrong with the routing.

    `eval_measures`: what an objective measures beside its loss, by task and name.
    """

    step: int
    eval_loss: ByTask = field(default_factory=dict)
    eval_measures: dict[str, ByTask] = field(default_factory=dict)
    eval_score: ByTask = field(default_factory=dict)
    alarm: str | None = None

    def measured(self, name: str) -> ByTask:
        """Return one of the objective's numbers by task."""
        return {task: numbers[name] for task, numbers in self.eval_measures.items() if name in numbers}


@dataclass(frozen=True)
class PlannedMemory:
    """The plan in a run's manifest, in bytes."""

    items: dict[str, int] = field(default_factory=dict)
    peak_bytes: int = 0
    trainable_parameters: int | None = None
    choices: dict[str, Choice] = field(default_factory=dict)


@dataclass(frozen=True)
class ChangedInputs:
    """From which step on a run's inputs were others."""

    step: int
    changed: list[str]


@dataclass(frozen=True)
class Manifest:
    """What a run's manifest says of its making."""

    device: str = "unknown"
    identity: dict[str, object] = field(default_factory=dict)
    lineage: list[ChangedInputs] = field(default_factory=list)
    plan: PlannedMemory = field(default_factory=PlannedMemory)


@dataclass(frozen=True)
class TaskScore:
    """A task's score and what it lies within; `metric` as the recipe names it."""

    score: float
    interval: tuple[float, float]
    metric: str = "exact"


@dataclass(frozen=True)
class ExportReport:
    """What an export keeps: losses by name, the share of the gain, nats a token away from the routed adapter.

    modules: of each linear `unexplained`, the share of the adapter's output that no static weights give.
    """

    strategy: str
    exact: bool
    loss: dict[str, float] | None = None
    gain_kept: float | None = None
    kl_per_token: float | None = None
    modules: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class RunContents:
    """The content of a run's files; `scores` by model and task; `damaged`: files that are left out."""

    folder: RunFolder
    recipe: Recipe
    manifest: Manifest
    steps: list[LoggedStep]
    evaluations: list[LoggedEvaluation]
    routing: RoutingReport | None
    scores: dict[str, dict[str, TaskScore]]
    export: ExportReport | None
    samples: list[Sample]
    damaged: list[str]

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return self.folder.path.resolve().name

    @property
    def alarm(self) -> str | None:
        """What the last evaluation found wrong with the routing, else None."""
        if self.routing is not None:
            return self.routing.alarm
        if not self.evaluations:
            return None
        return self.evaluations[-1].alarm

    @property
    def advice(self) -> str | None:
        """That the mixture acts nearly like one LoRA, and what to try; None where it does not, or is not known."""
        return None if self.routing is None else likeness_line(self.routing.summary)

    @property
    def training_s(self) -> float | None:
        """Seconds that the steps took, evaluations and saves apart; from those logged where not all are."""
        each = [line.tokens / line.tokens_per_s for line in self.steps if line.tokens and line.tokens_per_s]
        return sum(each) / len(each) * self.steps[-1].step if each else None

    def curve(self, number: Callable[[LoggedStep], float | None]) -> list[tuple[float, float]]:
        """Return one number of every logged step that has it, by step."""
        pairs = [(line.step, number(line)) for line in self.steps]
        return [(step, value) for step, value in pairs if value is not None]

    def task_curve(self, numbers: Callable[[LoggedEvaluation], ByTask], task: str) -> list[tuple[float, float]]:
        """Return one task's number of every evaluation that has it, by step."""
        pairs = [(line.step, numbers(line).get(task)) for line in self.evaluations]
        return [(step, value) for step, value in pairs if value is not None]

    def likeness(self, bank: str) -> list[tuple[float, float]]:
        """Return the mean |cos| over the pairs of experts of a bank at every step; nothing where there are no pairs."""
        if self.routing is None or not self.routing.pairs.get(bank):
            return []
        halves = self.curve(lambda line: line.penalty_down if bank == "down" else line.penalty_up)
        return [(step, half / self.routing.pairs[bank]) for step, half in halves]

    def mean_losses(self) -> list[float]:
        """Return the mean held-out loss over tasks at every evaluation that measured it."""
        by_task = [[loss for loss in line.eval_loss.values() if loss is not None] for line in self.evaluations]
        return [sum(losses) / len(losses) for losses in by_task if losses]


_STEP, _EVALUATION = TypeAdapter(LoggedStep), TypeAdapter(LoggedEvaluation)


def read_run(path: str | Path) -> RunContents:
    """Read a run folder, finished or not. Raises InputRefused where there is none, DamagedFile."""
    folder = RunFolder(Path(path))
    recipe = read_recipe(path)
    damaged: list[str] = []
    routing = read_routing(folder)
    manifest = _content(folder.manifest, TypeAdapter(Manifest), damaged) or Manifest()
    scores = _content(folder.scores, TypeAdapter(dict[str, dict[str, TaskScore]]), damaged) or {}
    export = _content(folder.export / "export_report.json", TypeAdapter(ExportReport), damaged)
    samples = _content(folder.samples, TypeAdapter(list[Sample]), damaged) or []
    steps, evaluations = _metrics(folder.metrics, damaged)
    return RunContents(folder, recipe, manifest, steps, evaluations, routing, scores, export, samples, damaged)


def _content(path: Path, kind: TypeAdapter[Content], damaged: list[str]) -> Content | None:
    """Return the content of a JSON file; None where there is none, or, which is noted, it is of another kind."""
    if not path.is_file():
        return None
    try:
        return kind.validate_json(path.read_bytes())
    except ValueError:
        damaged.append(path.name)
        return None


def _metrics(path: Path, damaged: list[str]) -> tuple[list[LoggedStep], list[LoggedEvaluation]]:
    """Return the lines of steps and of evaluations; a last one cut short by a kill is no damage."""
    steps: list[LoggedStep] = []
    evaluations: list[LoggedEvaluation] = []
    if not path.is_file():
        return steps, evaluations
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines):
        try:
            content = json.loads(line)
            if "learning_rate" in content:
                steps.append(_STEP.validate_python(content))
            else:
                evaluations.append(_EVALUATION.validate_python(content))
        except (ValueError, TypeError, RecursionError):
            if number + 1 < len(lines) and path.name not in damaged:
                damaged.append(path.name)
    return steps, evaluations


__all__ = [
    "ByTask",
    "ExportReport",
    "LoggedEvaluation",
    "LoggedStep",
    "Manifest",
    "PlannedMemory",
    "RunContents",
    "TaskScore",
    "read_run",
]
