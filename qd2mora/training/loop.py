"""The loop: step n is a function of the recipe, the seed and n, so that a resumed run is the same run.

A step reads its rows from the mixture by number, adds up its gradient over micro batches and processes, and updates.
Until the update nothing is changed, so a step can be done again: on smaller micro batches where memory ran out, at a
smaller loss scale where float16 overflowed.
"""

import math
import time
from dataclasses import dataclass

import torch

from qd2mora.data import Row
from qd2mora.errors import NotFinite, SignalStop
from qd2mora.memory.faults import as_lost
from qd2mora.mixture import after_step
from qd2mora.recipe import Train
from qd2mora.stopping import StopRequest
from qd2mora.training.best import BestKeeper
from qd2mora.training.checkpoint import Saver
from qd2mora.training.clock import TimeLimit
from qd2mora.training.disk_space import as_trouble
from qd2mora.training.gradient import Penalties, StepGradient, is_too_bad, lower_scale, raise_scale
from qd2mora.training.held_out import Evaluation, HeldOut
from qd2mora.training.journal import Journal
from qd2mora.training.load import max_load
from qd2mora.training.micro_batches import Course
from qd2mora.training.progress import Best, Progress, best_of_json
from qd2mora.training.updates import enter_phase, learning_rate


@dataclass
class Training:
    """A run under way: what its steps are made of, and who writes down what they come to."""

    train: Train
    course: Course
    progress: Progress
    gradient: StepGradient
    held_out: HeldOut
    saver: Saver
    best: BestKeeper
    journal: Journal
    stop: StopRequest
    time_limit: TimeLimit

    def __post_init__(self) -> None:
        self.batches = self.gradient.batches
        self.updater, self.processes = self.batches.updater, self.batches.processes
        self.opening = self.gradient.opening
        self.watchdog = self.held_out.watchdog
        self._why_stop = ""

    def run(self) -> dict[str, float]:
        """Train to the end; return the last held-out losses.

        Raises SignalStop after saving when a signal came or time is up, NotFinite when steps keep failing, WillNotFit
        when one row does not fit, DeviceLost, DiskTrouble.
        """
        losses: dict[str, float] = {}
        with as_lost(), self.saver, self.watchdog:
            if self.progress.step == 0:
                # What the start scores: every later number is read against it.
                with self.stop.before_a_step():
                    losses = self._evaluate()
            while self.progress.step < self.course.total_steps and not self.has_stalled:
                began = time.monotonic()
                self._log(self._step())
                losses = self._after_step() or losses
                self.time_limit.took(time.monotonic() - began)
            with self.watchdog.paused():
                self.processes.from_main(self.saver.finish)
                self.processes.from_main(self._settle_best)
                self.processes.wait()
        return losses

    @property
    def has_stalled(self) -> bool:
        """Whether so many evaluations in a row were no better that training ends."""
        return self.train.early_stopping is not None and self.progress.stale >= self.train.early_stopping

    def _step(self) -> dict[str, float]:
        """Do the next step, and return what is told of it."""
        began, update, total = time.perf_counter(), self.progress.step, self.course.total_steps
        computing = self._computed_s()
        rows = self.course.rows(update)
        enter_phase(self.batches.model, self.train, update)
        self._tell(self.gradient.stages.news(update))
        rows = self.gradient.prepare(rows, self.watchdog)
        loss, norm, penalties = self._whole_gradient(rows)
        load = max_load(self.batches.model, self.processes)
        # By applied updates: steps that are passed over take nothing off the schedule's length.
        rate = learning_rate(self.train, self.progress.applied, total)
        # The data moves on whatever comes of the step, so that a bad one is never met twice.
        self.progress.step += 1
        if math.isfinite(loss) and math.isfinite(norm):
            self._update(rate, update)
        else:
            self._count_bad(rows, loss, norm)
        self.updater.forget_gradients()
        self.watchdog.alive()
        tokens, measures = sum(row.num_tokens for row in rows), self.gradient.measures()
        return {
            "loss": loss,
            **measures,
            "penalty": penalties.total,
            "penalty_down": penalties.down,
            "penalty_up": penalties.up,
            "grad_norm": norm,
            "learning_rate": rate,
            "tokens": tokens,
            "labels": sum(line.num_labels for row in rows for line in row.lines),
            "bad_steps": self.progress.bad_steps,
            "tokens_per_s": tokens / (time.perf_counter() - began),
            "step_s": self._computed_s() - computing,
            "memory": self.processes.peak_bytes(),
            **({} if load is None else {"max_load": load}),
        }

    def _computed_s(self) -> float:
        """Return the seconds that this process computed: of the processor on a CPU, which others may share."""
        if self.processes.device.type == "cpu":
            return time.process_time()
        return time.perf_counter()

    def _whole_gradient(self, rows: list[Row]) -> tuple[float, float, Penalties]:
        """Leave a step's whole gradient in the parameters; return loss, gradient norm and penalties."""
        while True:
            local = self.batches.attempt(lambda: self.gradient.accumulate(rows, self.watchdog.beat))
            # Processes meet once a step: what any of them has to say is said here.
            asked = self.stop.number is not None, self.time_limit.is_near, local is None, self.saver.has_failed
            if local is None:
                # A process that is short of memory still sends: the others are waiting in the same message.
                local = torch.zeros(())
            loss, *stops, short, failed = self.processes.sum_numbers([local, *map(float, asked)])
            self._why_stop = self._reason(*stops)
            if failed:
                # Raises on every process what the writing thread of the main one ran into.
                self.processes.from_main(self.saver.finish)
            if short:
                self.batches.halve()
                continue
            norm, penalties = self.gradient.finish()
            # A finite loss whose gradient is not: float16 overflowed on the way back, and a smaller scale may do. A
            # loss that is not finite no scale makes better.
            if math.isfinite(norm) or not math.isfinite(loss) or not lower_scale(self.progress):
                return loss, norm, penalties
            self.updater.forget_gradients()

    def _reason(self, signals: float, limits: float) -> str:
        """Say why to stop, if there is a reason; the same processes say so to all, so that all stop here."""
        if self.stop.number is not None:
            return f"signal {self.stop.number}"
        if signals:
            return "a signal to another process"
        if limits:
            return "train.time_limit"
        return ""

    def _tell(self, line: str) -> None:
        if line:
            self.journal.say(line)

    def _update(self, rate: float, update: int) -> None:
        self.updater.update(rate)
        if self.gradient.stages.moves_routers(update):
            # Load biases move once an update, by what all micro batches have counted (FlyLoRA's rule).
            after_step(self.batches.model)
        self.progress.applied += 1
        self.progress.bad_in_a_row = 0
        raise_scale(self.progress)

    def _count_bad(self, rows: list[Row], loss: float, norm: float) -> None:
        """Pass over a step whose numbers are not finite. Raises NotFinite where there have been too many."""
        self.progress.bad_steps += 1
        self.progress.bad_in_a_row += 1
        if not is_too_bad(self.progress):
            return
        where = self.gradient.blame(rows)
        in_a_row = f"{self.progress.bad_in_a_row} bad steps in a row, {self.progress.bad_steps} in all"
        raise NotFinite(
            f"step {self.progress.step}: loss {loss}, gradient norm {norm}, {in_a_row}; first not finite: {where}; "
            "continue with a lower train.learning_rate, --resume and --allow-changed train.learning_rate"
        )

    def _after_step(self) -> dict[str, float]:
        """Evaluate, save and stop where it is time to; return the held-out losses where there are new ones."""
        done = self.progress.step
        is_last = done == self.course.total_steps
        losses: dict[str, float] = {}
        if done % self.train.eval_every == 0 or is_last:
            losses = self._evaluate()
        if self.has_stalled and not is_last:
            is_last = True
            self.journal.say(f"no better evaluation overall in {self.progress.stale}: stopped after step {done}")
        if done % self.train.save_every == 0 or is_last or self._why_stop:
            self._save()
        # At the last step there is nothing to stop any more: the run ends as it would have.
        if self._why_stop and not is_last:
            with self.watchdog.paused():
                self.processes.from_main(self.saver.finish)
                self.processes.wait()
            raise SignalStop(f"stopped by {self._why_stop} after step {done}; continue with --resume")
        return losses

    def _save(self) -> None:
        # A slow disk is no hanging step.
        with self.watchdog.paused():
            # All processes learn whether the save before went well, before any of them collects the next.
            self.processes.from_main(self.saver.finish)
            self.saver.begin(self.progress)
            self.processes.from_main(self._settle_best)  # the checkpoint before this one is on disk by now

    def _evaluate(self) -> dict[str, float]:
        """Evaluate, tell and judge; return the held-out losses."""
        found = self.held_out.evaluate()
        self.journal.evaluation(self.progress.step, found)
        if found.routing and found.alarm and self.held_out.live.is_news(found.routing):
            self.journal.say(f"warning: {found.alarm}")
        if self.progress.step:
            with self.watchdog.paused():
                # The main process judges for all: another GPU's scores may differ.
                best, self.progress.stale = self.processes.from_main(lambda: self._judge(found))
                self.progress.best = best_of_json(best)
                if self.opening.told is not None:
                    self._tell(self.opening.open(*self.processes.from_main(lambda: self.opening.judge(found.losses))))
        return found.losses

    def _judge(self, found: Evaluation) -> tuple[dict[str, Best], int]:
        with as_trouble("the best adapter", self.best.folder):
            self.best.note(self.progress, found.losses, found.scores)
        return self.progress.best, self.progress.stale

    def _settle_best(self) -> None:
        with as_trouble("the best adapter", self.best.folder):
            self.best.settle(self.progress)

    def _log(self, metrics: dict[str, float]) -> None:
        step = self.progress.step
        self.journal.step(step, metrics, step % self.train.log_every == 0 or step == self.course.total_steps)


__all__ = ["Training"]
