"""The loop: step n is a function of the recipe, the seed and n, so that a resumed run is the same run.

A step reads its rows from the mixture by number, normalises by the labelled tokens of the whole step over all micro
batches and processes, adds up the gradients of all processes, adds the gradient of the penalty once, clips, and
updates. Until the update nothing is changed, so a step can be done again: on smaller micro batches where memory ran
out, at a smaller loss scale where float16 overflowed.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from qd2mora.base.passes import CHUNK
from qd2mora.data import MicroBatch, Row, TaskMix, TaskRows, dealt, lines_together
from qd2mora.errors import NotFinite, SignalStop, WillNotFit
from qd2mora.evaluation import Score
from qd2mora.memory.faults import as_lost, tried
from qd2mora.memory.loss import RowLoss
from qd2mora.mixture import MixtureConfig, after_step, penalty_terms, routing_of
from qd2mora.recipe import Train
from qd2mora.stopping import StopRequest
from qd2mora.training.best import BestKeeper
from qd2mora.training.disk import as_trouble
from qd2mora.training.estimator import backward_over_draws
from qd2mora.training.held_out import held_out_losses
from qd2mora.training.journal import Journal
from qd2mora.training.live_routing import LiveRouting
from qd2mora.training.numbers import blame, is_too_bad, lower_scale, prove_flow, raise_scale
from qd2mora.training.optimizer import learning_rate
from qd2mora.training.processes import Processes
from qd2mora.training.randomness import key_of
from qd2mora.training.saver import Saver
from qd2mora.training.stages import enter_stage
from qd2mora.training.state import Progress
from qd2mora.training.time_limit import TimeLimit
from qd2mora.training.watchdog import Watchdog
from qd2mora.training.zero import ZeroOptimizer


@dataclass
class Training:
    """Everything the loop works on; `parameters` are the trainable ones by name."""

    train: Train
    processes: Processes
    model: PeftModel
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer | ZeroOptimizer
    mixture: TaskMix
    tasks: list[TaskRows]
    config: MixtureConfig
    micro_batch: int
    total_steps: int
    pad: int
    progress: Progress
    saver: Saver
    journal: Journal
    stop: StopRequest
    time_limit: TimeLimit
    best: BestKeeper
    loss_chunk: int = CHUNK
    capacity: int | None = None
    """Tokens that rows of a step may share a line of; None: each row has its own."""
    score: Callable[[], dict[str, Score]] = dict
    watchdog: Watchdog = field(default_factory=Watchdog)
    _why_stop: str = ""

    def __post_init__(self) -> None:
        self.row_loss = RowLoss(self.model, self.loss_chunk)
        # None where the adapter has no routers of ours.
        self._routing = routing_of(self.model)
        self.live = LiveRouting(self.model, self.tasks)

    def run(self) -> dict[str, float]:
        """Train to the end; return the last held-out losses.

        Raises SignalStop after saving when a signal came or time is up, NotFinite when steps keep failing, WillNotFit
        when one row does not fit, DeviceLost, DiskTrouble.
        """
        losses: dict[str, float] = {}
        with as_lost(), self.saver, self.watchdog:
            if self.progress.step == 0:
                losses = self._evaluate_and_log()
            while self.progress.step < self.total_steps and not self.has_stalled:
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
        began, update = time.perf_counter(), self.progress.step
        rows = self.mixture.rows(update * self.train.global_batch, self.train.global_batch)
        enter_stage(self.model, self.optimizer, self.config, update, self.total_steps)
        loss, norm, penalty, halves = self._gradients(rows)
        rate = learning_rate(self.train, self.progress.applied, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.progress.step += 1
        if math.isfinite(loss) and math.isfinite(norm):
            self.optimizer.step()
            after_step(self.model)
            self.progress.applied += 1
            self.progress.bad_in_a_row = 0
            raise_scale(self.progress)
        else:
            self._count_bad(rows, loss, norm)
        self.optimizer.zero_grad(set_to_none=True)
        self.watchdog.beat()
        tokens = sum(len(row.ids) for row in rows)
        return {
            "loss": loss,
            "penalty": penalty,
            "penalty_down": halves[0],
            "penalty_up": halves[1],
            "grad_norm": norm,
            "learning_rate": rate,
            "tokens": tokens,
            "labels": sum(row.num_labels for row in rows),
            "bad_steps": self.progress.bad_steps,
            "tokens_per_s": tokens / (time.perf_counter() - began),
            "memory": self.processes.peak_bytes(),
        }

    def _gradients(self, rows: list[Row]) -> tuple[float, float, float, list[float]]:
        """Leave a step's whole gradient in the parameters; return loss, gradient norm, penalties, likeness."""
        while True:
            local, is_short = self._try_to_accumulate(rows)
            asked = self.stop.number is not None, self.time_limit.is_near, is_short, self.saver.has_failed
            loss, *stops, short, failed = self.processes.sum_numbers([local, *map(float, asked)])
            self._why_stop = self._reason(*stops)
            if failed:
                self.processes.from_main(self.saver.finish)
            if short:
                self.halve_micro_batch()
                continue
            self.processes.sum_gradients(self.parameters)
            self._unscale()
            prove_flow(self.model, self.parameters, self.progress)  # the penalty would hide a detached expert
            penalty, halves = self._add_penalties()
            norm = self._clip()
            if math.isfinite(norm) or not math.isfinite(loss) or not lower_scale(self.progress):
                return loss, norm, penalty, halves
            self.optimizer.zero_grad(set_to_none=True)

    def _reason(self, signals: float, limits: float) -> str:
        """Say why to stop, if there is a reason; the same processes say so to all, so that all stop here."""
        if self.stop.number is not None:
            return f"signal {self.stop.number}"
        if signals:
            return "a signal to another process"
        return "train.time_limit" if limits else ""

    def _try_to_accumulate(self, rows: list[Row]) -> tuple[Tensor | float, bool]:
        """Return this process's part of the loss, and whether memory ran out on the way."""
        loss, is_short = tried(lambda: self._accumulate(rows))
        if loss is not None:
            return loss, is_short
        self.abandon()
        return 0.0, is_short

    def abandon(self) -> None:
        """Give up a try that ran out of memory. Raises WillNotFit where other processes cannot do theirs again."""
        if isinstance(self.optimizer, ZeroOptimizer):
            self.optimizer.refuse_again()
        self.let_go()

    def let_go(self) -> None:
        """Drop what an abandoned try has left on the device."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.processes.device.type == "cuda":
            torch.cuda.empty_cache()

    def _accumulate(self, rows: list[Row]) -> Tensor:
        """Add the gradients of this process's rows; return their part of the loss per labelled token of the step."""
        place = (self.progress.step, self.processes.index)
        torch.manual_seed(key_of(self.train.seed, "step", *place))
        share, tokens = 1 / sum(row.num_labels for row in rows), sum(len(row.ids) for row in rows)
        total = torch.zeros((), device=self.processes.device)
        if self._routing is not None:
            self._routing.forget()
        for part in self.micro_batches(rows, self.progress.step * self.train.global_batch, self.capacity):
            self.tell_routers(part)
            if self._routing is not None:
                parts = (part.num_tokens / tokens, len(part.rows) / len(rows))
                self._routing.share = (part.weight * parts[0], part.weight * parts[1])
                self._routing.loss_scale = self.progress.loss_scale or 1.0
            total += self.backward(part, share * part.weight)
            self.watchdog.beat()
        return total

    def backward(self, part: MicroBatch, share: float) -> Tensor:
        """Add the gradients of one micro batch; return its part of the step's loss. `share`: one over all labels."""

        def backward(loss: Tensor) -> None:
            scaled = loss * (self.progress.loss_scale or 1.0)
            # An engine would take a backward pass for a step of its own.
            self._add_gradient(scaled, self.parameters.values()) if isinstance(
                self.optimizer, ZeroOptimizer
            ) else scaled.backward()

        if self.config.row.estimator == "rloo":
            assert self._routing is not None
            return backward_over_draws(lambda: self.row_losses(part), backward, self._routing, share) * share
        loss = self.row_losses(part).sum() * share
        backward(loss)
        return loss.detach()

    def tell_routers(self, part: MicroBatch) -> None:
        """Say which rows run: chance in the adapters is a function of their keys, whatever the split."""
        if self._routing is not None:
            self._routing.rows, self._routing.lengths = part.keys, tuple(len(row.ids) for row in part.rows)
            self._routing.places, self._routing.is_counted = part.places, part.weight > 0

    def row_losses(self, part: MicroBatch) -> Tensor:
        """Return the summed loss of each row."""
        batch = {name: tensor.to(self.processes.device) for name, tensor in part.collated(self.pad).items()}
        is_scaled = self.progress.loss_scale is not None
        with torch.autocast(self.processes.device.type, torch.float16, enabled=is_scaled):
            losses: Tensor = self.row_loss(batch)
        return losses

    def _unscale(self) -> None:
        if self.progress.loss_scale is not None:
            for parameter in self.parameters.values():
                if parameter.grad is not None:
                    parameter.grad.mul_(1 / self.progress.loss_scale)

    def _add_penalties(self) -> tuple[float, list[float]]:
        """Add the gradients of penalties that read weights, once a step.

        Return what all penalties added to the loss, those that read routing included, and how alike the down and the up
        experts are: the two halves of D2MoRA's penalty, unweighted.
        """
        routed = sum(self._routing.take_values().values()) if self._routing is not None else 0.0
        (total,) = self.processes.sum_numbers([routed])
        added = torch.zeros((), device=self.processes.device)
        halves = {"mixture_A": added.clone(), "mixture_B": added.clone()}
        weights = {penalty.kind: penalty.weight for penalty in self.config.weight_penalties}
        for kind, weight in ({"diversity_cos": 0.0} | weights).items():
            with torch.set_grad_enabled(weight > 0):
                for name, value, tensors in penalty_terms(self.model, kind):
                    added += weight * value.detach()
                    if kind == "diversity_cos":
                        halves[name] += value.detach()
                    if value.requires_grad:
                        self._add_gradient(weight * value, tensors)
        return total + float(added), [float(half) for half in halves.values()]

    def _add_gradient(self, value: Tensor, of: Iterable[Tensor]) -> None:
        trained = [tensor for tensor in of if tensor.requires_grad]
        gradients = torch.autograd.grad(value, trained, allow_unused=True)
        for tensor, gradient in zip(trained, gradients, strict=True):
            if gradient is not None:
                tensor.grad = gradient if tensor.grad is None else tensor.grad.add_(gradient)

    def _clip(self) -> float:
        limit = self.train.max_grad_norm or math.inf
        return float(nn.utils.clip_grad_norm_(list(self.parameters.values()), limit))

    def _count_bad(self, rows: list[Row], loss: float, norm: float) -> None:
        self.progress.bad_steps += 1
        self.progress.bad_in_a_row += 1
        if not is_too_bad(self.progress):
            return
        part = next(self.micro_batches(rows, 0))
        self.tell_routers(part)
        with torch.no_grad():
            where = blame(self.model, self.parameters, lambda: self.row_losses(part))
        in_a_row = f"{self.progress.bad_in_a_row} bad steps in a row, {self.progress.bad_steps} in all"
        raise NotFinite(
            f"step {self.progress.step}: loss {loss}, gradient norm {norm}, {in_a_row}; first not finite: {where}; "
            "continue with a lower train.learning_rate, --resume and --allow-changed train.learning_rate"
        )

    def halve_micro_batch(self, doing: str = "") -> None:
        """Go on with smaller micro batches, and say so. Raises WillNotFit where there are none, for what was done."""
        if self.micro_batch == 1:
            doing = doing or f"step {self.progress.step + 1}"
            raise WillNotFit(
                f"memory: {doing} does not fit the device with one row at a time; lower "
                "data.max_length, or see `qd2mora plan` for what takes the memory"
            )
        self.micro_batch = self.progress.micro_batch = self.micro_batch // 2
        self.optimizer.zero_grad(set_to_none=True)
        self.journal.say(f"out of memory: from step {self.progress.step + 1} on micro batches of {self.micro_batch}")

    def _after_step(self) -> dict[str, float]:
        """Evaluate, save and stop where it is time to; return the held-out losses where there are new ones."""
        done = self.progress.step
        is_last = done == self.total_steps
        losses = self._evaluate_and_log() if done % self.train.eval_every == 0 or is_last else {}
        if self.has_stalled and not is_last:
            is_last = True
            self.journal.say(f"no better evaluation overall in {self.progress.stale}: stopped after step {done}")
        if done % self.train.save_every == 0 or is_last or self._why_stop:
            with self.watchdog.paused():
                self.processes.from_main(self.saver.finish)
                self.saver.save(self.progress)
                self.processes.from_main(self._settle_best)  # the checkpoint before this one is on disk by now
        if self._why_stop and not is_last:
            with self.watchdog.paused():
                self.processes.from_main(self.saver.finish)
                self.processes.wait()
            raise SignalStop(f"stopped by {self._why_stop} after step {done}; continue with --resume")
        return losses

    def micro_batches(self, rows: Sequence[Row], first: int, capacity: int | None = None) -> Iterator[MicroBatch]:
        """Yield this process's micro batches, lines of like length together; keys number the rows from `first` on.

        A line is a row, or with `capacity` what fits that many tokens. Whole ones are dealt out: routers see the same.
        """
        whole = lines_together([len(row.ids) for row in rows], self.micro_batch, capacity)
        in_step = isinstance(self.optimizer, ZeroOptimizer) and self.optimizer.shares_weights
        for (numbers, packs), weight in dealt(whole, self.processes.index, self.processes.count, in_step):
            keys = tuple(key_of(self.train.seed, "row", first + number) for number in numbers)
            yield MicroBatch([rows[number] for number in numbers], keys, packs, weight)

    def _evaluate_and_log(self) -> dict[str, float]:
        losses, scores = held_out_losses(self), self._scores()
        step = self.progress.step
        numbers, alarm = self.live.take(step, self.processes.sum_tensor, self.processes.device)
        self.journal.evaluation(step, losses, {task: score.mean for task, score in scores.items()}, numbers, alarm)
        if numbers and alarm and self.live.is_news(numbers):
            self.journal.say(f"warning: {alarm}")
        if step:
            with self.watchdog.paused():
                judge = self._judge(losses, scores)
                self.progress.best, self.progress.stale = self.processes.from_main(judge)
        return losses

    def _judge(self, losses: dict[str, float], scores: dict[str, Score]) -> Callable[[], tuple[dict[str, Any], int]]:
        """Return the judgement of an evaluation, for the main process: another GPU's scores may differ."""

        def judge() -> tuple[dict[str, Any], int]:
            with as_trouble("the best adapter", self.best.folder):
                self.best.note(self.progress, losses, scores)
            return self.progress.best, self.progress.stale

        return judge

    def _scores(self) -> dict[str, Score]:
        """Score the tasks that name a metric."""
        if self._routing is not None:
            self._routing.rows = self._routing.lengths = self._routing.places = None
        self.model.eval()
        with self.watchdog.paused():
            scores = self.score()
        self.model.train()
        return scores

    def _settle_best(self) -> None:
        with as_trouble("the best adapter", self.best.folder):
            self.best.settle(self.progress)

    def _log(self, metrics: dict[str, float]) -> None:
        step = self.progress.step
        self.journal.step(step, metrics, step % self.train.log_every == 0 or step == self.total_steps)


__all__ = ["Training"]
