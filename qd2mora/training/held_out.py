"""Held-out rows while a run goes on: their losses, their scores, and what routers do on the way.

Nothing is changed by an evaluation, so one that ran out of memory is done again on smaller micro batches, as a step is.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from peft import PeftModel

from qd2mora.data import MicroBatch, Row, TaskRows
from qd2mora.errors import SignalStop
from qd2mora.evaluation import AskedTask, Record, Score, Subject
from qd2mora.evaluation.score import refuse_not_finite
from qd2mora.evaluation.scoring import ROWS_AT_ONCE, batches_of, score_batch
from qd2mora.inspection import RoutingReport, RoutingWatch, collapse_line, routing_report, summary
from qd2mora.inspection.finished_run import TRAINING_ROWS, rows_seen, rows_to_watch
from qd2mora.inspection.routing_summary import measured
from qd2mora.memory.loss import labelled_states
from qd2mora.objectives import Measures, told
from qd2mora.stopping import BEFORE_A_STEP, StopRequest
from qd2mora.terminal.pace import Pace
from qd2mora.training.clock import Watchdog
from qd2mora.training.micro_batches import MicroBatches
from qd2mora.training.processes import Processes
from qd2mora.training.rollouts import Rollouts


@dataclass(frozen=True)
class Evaluation:
    """What held-out rows say of a step: losses and scores by task, what routers did, and what is wrong with that.

    `measures`: what the objective measures beside its loss, by task.
    """

    losses: dict[str, float]
    measures: Mapping[str, Measures]
    scores: dict[str, Score]
    routing: Mapping[str, float | None] | None
    alarm: str | None


class LiveRouting:
    """Watches the routers of a run whenever it is evaluated; where a method has none, does nothing."""

    def __init__(self, model: PeftModel, tasks: list[TaskRows], asks_all: bool = False) -> None:
        self.model, self.tasks = model, tasks
        self.watch = RoutingWatch(model, len(tasks), asks_all=asks_all)
        self.step: int | None = None
        self._num_told = 0.0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count anew, while the block lasts."""
        self.watch.start()
        with self.watch.watching():
            yield

    def stand_ins(self, task: TaskRows) -> list[Row]:
        """Return training rows to watch of a task that holds none out; none where nothing is watched."""
        if task.validation or not self.watch.routers:
            return []
        return rows_to_watch(task, TRAINING_ROWS)

    def take(self, step: int, processes: Processes) -> tuple[Mapping[str, float | None] | None, str | None]:
        """Return the numbers of what all processes counted, and one line where routers have collapsed."""
        self.watch.reduce(processes.sum_tensor, processes.device)
        found = measured(self.watch)
        if not found:
            return None, None
        self.step = step
        return summary(found, self.model), collapse_line(found)

    def is_news(self, numbers: Mapping[str, float | None]) -> bool:
        """Tell whether a collapse has not been told yet, or has doubled since."""
        collapsed = numbers["collapsed"] or 0
        if collapsed < max(1, 2 * self._num_told):
            return False
        self._num_told = collapsed
        return True

    def report(self) -> RoutingReport:
        """Return the report of the last evaluation."""
        names = [task.task.name for task in self.tasks]
        chosen = [task.validation or self.stand_ins(task) for task in self.tasks]
        return routing_report(self.watch, self.model, names, rows_seen(self.tasks, chosen), self.step)


@dataclass(frozen=True)
class HeldOut:
    """The rows that a run does not learn from; every process takes its part of them."""

    batches: MicroBatches
    tasks: list[TaskRows]
    live: LiveRouting
    score: Callable[[Callable[[], bool]], dict[str, Score]]
    """Scores the tasks that name a metric; asks after each batch whether the next is wanted."""
    watchdog: Watchdog
    pace: Callable[[str, float], Pace] = lambda what, total: Pace(what, total, lambda line: None)
    """Makes what tells how far an evaluation is."""
    rollouts: Rollouts | None = None
    stop: StopRequest = field(default_factory=StopRequest)

    def evaluate(self) -> Evaluation:
        """Evaluate the model as it is. Raises WillNotFit, and SignalStop before the first step alone."""
        (losses, measures), scores = self.losses(), self._scores()
        self._refuse_broken_off()
        routing, alarm = self.live.take(self.batches.progress.step, self.batches.processes)
        return Evaluation(losses, measures, scores, routing, alarm)

    def losses(self) -> tuple[dict[str, float], dict[str, Measures]]:
        """Return the objective's loss of each task that holds rows out, and what it measures. Raises WillNotFit."""
        batches = self.batches
        batches.model.eval()
        doing = f"the evaluation after step {batches.progress.step}"
        baselines = {task.task.name: batches.baseline(task.validation, self.goes_on, doing) for task in self.tasks}
        sums = batches.until_it_fits(lambda: self._sums(baselines), doing)
        batches.model.train()
        names = [task.task.name for task in self.tasks if task.validation]
        summed, measured = batches.processes.sum_numbers(sums), batches.objective.names
        width = 2 + 2 * len(measured)
        by_task = {name: summed[place * width : (place + 1) * width] for place, name in enumerate(names)}
        self._refuse_broken_off()
        losses = {name: total / counted for name, (total, counted, *_) in by_task.items()}
        if self.rollouts is not None:
            with self.watchdog.paused():
                rewards = self.rollouts.held_out(self.tasks)
            # What is judged is to fall.
            # Less than nought, not negated: a mean of 0 would be told as -0.0.
            return {name: 0.0 - mean for name, mean in rewards.items()}, {
                name: {"reward": rewards[name]} for name in names
            }
        return losses, {name: told(measured, rest) for name, (_, _, *rest) in by_task.items() if measured}

    def goes_on(self) -> bool:
        """Give a sign of life; tell whether the next batch is wanted.

        It is after a step, whose checkpoint is judged by what is found. Before the first nothing is at stake, and a
        signal ends the pass.
        """
        self.watchdog.alive()
        if self.batches.progress.step > 0:
            return True
        asked = float(self.stop.number is not None)
        # Processes that share weights run each batch together, and leave together; others meet at the pass's end.
        if self.batches.updater.shares_weights:
            (asked,) = self.batches.processes.sum_numbers([asked])
        return not asked

    def _goes_on_asking(self) -> bool:
        """Tell the same of what is scored, of which processes have unlike numbers of batches."""
        return self.batches.progress.step > 0 or self.batches.updater.shares_weights or self.stop.number is None

    def _refuse_broken_off(self) -> None:
        """Raise SignalStop, on every process, where one has left a pass: its numbers are of a part of the rows."""
        if self.batches.progress.step > 0:
            return
        (asked,) = self.batches.processes.sum_numbers([float(self.stop.number is not None)])
        if asked:
            by = "a signal to another process" if self.stop.number is None else f"signal {self.stop.number}"
            raise SignalStop(f"stopped by {by} before the first step; {BEFORE_A_STEP}")

    def _scores(self) -> dict[str, Score]:
        # A prompt that is answered has no row of the run, and must not draw by the last one's key.
        self.batches.forget_rows()
        self.batches.model.eval()
        # Answers are written token by token, at no pace that a micro batch of training could tell.
        with self.watchdog.paused():
            scores = self.score(self._goes_on_asking)
        self.batches.model.train()
        return scores

    def _sums(self, baselines: Mapping[str, float]) -> list[float]:
        """Return this process's summed loss, what it is divided by and measures of each task that holds rows out."""
        sums = []
        # Without held-out rows routers watch others once a step has shown that micro batches of this size fit.
        watched = {
            task.task.name: self.live.stand_ins(task) if self.batches.progress.step > 0 else [] for task in self.tasks
        }
        total = sum(len(task.validation) or len(watched[task.task.name]) for task in self.tasks)
        pace = self.pace("held-out rows", total / self.batches.processes.count)
        with self.live.watching():
            for task in self.tasks:
                if task.validation:
                    sums += self._loss_of(task.validation, baselines[task.task.name], pace)
                else:
                    self._run_through(watched[task.task.name], pace)
        return sums

    def _loss_of(self, rows: Sequence[Row], baseline: float, pace: Pace) -> list[float]:
        """Return the summed loss of this process's rows, what it is divided by, and the sums that were measured."""
        # Thousands of rows add up: float32 would lose digits that comparing evaluations needs.
        objective = self.batches.objective
        sums = torch.zeros(2 + 2 * len(objective.names), dtype=torch.float64)

        def add(part: MicroBatch) -> None:
            said = self.batches.said(part, baseline)
            loss = objective.losses(said).sum().double().cpu()
            counted = torch.tensor(
                float(sum(objective.count(row) for row in part.rows[:: objective.lines])), dtype=torch.float64
            )
            measured = objective.measures(said).double().cpu().flatten()
            sums.add_(torch.cat([torch.stack([loss, counted]), measured]) * part.weight)

        self._each(rows, add, pace)
        return [float(number) for number in sums]

    def _run_through(self, rows: Sequence[Row], pace: Pace) -> None:
        """Let rows pass the routers, without a loss."""

        def run(part: MicroBatch) -> None:
            labelled_states(self.batches.model, self.batches.collated(part))

        self._each(rows, run, pace)

    def _each(self, rows: Sequence[Row], act: Callable[[MicroBatch], None], pace: Pace) -> None:
        """Do something with each micro batch, without gradient; each is a sign of life."""
        for part in self.batches.of(rows, 0):
            self.batches.tell_routers(part)
            with torch.no_grad():
                act(part)
            pace.advance(len(part.rows) / self.batches.objective.lines)
            if not self.goes_on():
                break


def score_together(
    subject: Subject,
    asked: list[AskedTask],
    processes: Processes,
    pace: Pace | None = None,
    goes_on: Callable[[], bool] = lambda: True,
) -> dict[str, Score]:
    """Score tasks; what was written stays with the process that asked. Raises NotFinite, on every process.

    `goes_on`: asked after each batch; False ends it, and the numbers are of no use. Batches are those of one process,
    so that the numbers are the same for any number of processes.
    """
    return {task.name: _score(subject, task, processes, pace, goes_on) for task in asked}


def _score(
    subject: Subject, task: AskedTask, processes: Processes, pace: Pace | None, goes_on: Callable[[], bool]
) -> Score:
    # A place for every row: each process fills in its own, and the sum is all of them, in the rows' order.
    numbers = [0.0] * (3 * len(task.rows))
    for batch in list(batches_of(task, (), ROWS_AT_ONCE))[processes.index :: processes.count]:
        for record in score_batch(subject, task, batch):
            numbers[3 * record.row : 3 * record.row + 3] = record.value, record.loss, record.labels
        if pace is not None:
            pace.advance(len(batch) * processes.count)
        if not goes_on():
            break
    summed = processes.sum_numbers(numbers)
    records = [
        Record(row, summed[3 * row], summed[3 * row + 1], round(summed[3 * row + 2])) for row in range(len(task.rows))
    ]
    refuse_not_finite(task.name, records)
    return Score(task.metric, tuple(records))


__all__ = ["Evaluation", "HeldOut", "LiveRouting", "score_together"]
