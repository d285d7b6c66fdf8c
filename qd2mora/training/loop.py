"""The loop: step n is a function of the recipe, the seed and n, so that a resumed run is the same run.

A step reads its rows from the mixture by number, normalises by the labelled tokens of the whole step over all micro
batches and processes, adds the gradient of the penalty once, clips, and updates.
"""

import contextlib
import json
import math
import resource
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FrameType

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from qd2mora.data import Mixture, Row, TaskRows, collate
from qd2mora.errors import NotFinite, SignalStop
from qd2mora.mixture import MixtureConfig, Routing, after_step, orthogonality, routing_of, weight_penalty
from qd2mora.mixture.draws import mixed
from qd2mora.recipe import Train
from qd2mora.run_folder import RunFolder
from qd2mora.training import checkpoint
from qd2mora.training.estimator import backward_over_draws
from qd2mora.training.optimizer import learning_rate
from qd2mora.training.progress import StepDisplay
from qd2mora.training.stages import enter_stage

MAX_BAD_IN_A_ROW = 3


@dataclass
class Training:
    """Everything the loop works on; `parameters` are the trainable ones by name."""

    train: Train
    folder: RunFolder
    accelerator: Accelerator
    model: nn.Module
    row_loss: nn.Module
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    mixture: Mixture
    tasks: list[TaskRows]
    config: MixtureConfig
    micro_batch: int
    total_steps: int
    pad: int
    bad_steps: int = 0
    _bad_in_a_row: int = 0
    _stop: list[int] = field(default_factory=list)

    @property
    def routing(self) -> Routing | None:
        """What the routers are told; None where the adapter has none."""
        return routing_of(self.model)

    def run(self, start: int, display: StepDisplay) -> dict[str, float]:
        """Train from update `start` to the end; return the last held-out losses.

        Raises SignalStop after saving when a signal came, NotFinite when steps keep failing.
        """
        losses: dict[str, float] = {}
        with self._signals(), display:
            if start == 0:
                losses = self._evaluate_and_log(0, display)
            for update in range(start, self.total_steps):
                metrics = self._step(update)
                done = update + 1
                self._log(done, metrics, display)
                is_last = done == self.total_steps
                if done % self.train.eval_every == 0 or is_last:
                    losses = self._evaluate_and_log(done, display)
                if done % self.train.save_every == 0 or is_last or self._stop:
                    self.save(done)
                if self._stop and not is_last:
                    raise SignalStop(f"stopped by signal {self._stop[0]} after step {done}; continue with --resume")
        return losses

    def save(self, step: int) -> None:
        """Publish a checkpoint from the main process."""
        if self.accelerator.is_main_process:
            checkpoint.save(self.folder.checkpoints, step, self.parameters, self.optimizer, self.train.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def evaluate(self) -> dict[str, float]:
        """Return the held-out loss per labelled token of each task, in nats."""
        self.model.eval()
        losses = {}
        for task in self.tasks:
            if task.validation:
                sums = torch.zeros(2, dtype=torch.float64)
                for places in self._micro_batches(task.validation):
                    rows = [task.validation[place] for place in places]
                    with torch.no_grad():
                        loss = self.row_loss(self._batch(rows)).sum().double().cpu()
                    sums += torch.stack([loss, torch.tensor(float(sum(row.num_labels for row in rows)))])
                total: Tensor = self.accelerator.reduce(sums.to(self.accelerator.device, torch.float32), "sum")
                losses[task.task.name] = float(total[0] / total[1])
        self.model.train()
        return losses

    def _step(self, update: int) -> dict[str, float]:
        began = time.perf_counter()
        torch.manual_seed(self._random_seed(update))
        rows = self.mixture.rows(update * self.train.global_batch, self.train.global_batch)
        enter_stage(self.model, self.optimizer, self.config, update, self.total_steps)
        loss = self._accumulate(rows, update)
        penalty, halves = self._add_penalties()
        rate = learning_rate(self.train, update, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        norm = self._clip()
        is_finite = math.isfinite(loss) and math.isfinite(norm)
        if is_finite:
            self.optimizer.step()
            after_step(self.model)
        self._count_bad(is_finite, update, loss, norm)
        self.optimizer.zero_grad(set_to_none=True)
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
            "tokens_per_s": tokens / (time.perf_counter() - began),
            "memory": self._memory(),
        }

    def _accumulate(self, rows: list[Row], update: int) -> float:
        """Add the gradients of a step's rows; return the loss per labelled token over all processes."""
        num_labels = sum(row.num_labels for row in rows)
        total = torch.zeros((), device=self.accelerator.device)
        parts = list(self._micro_batches(rows))
        for number, places in enumerate(parts):
            is_last = number == len(parts) - 1
            self._tell_routers(places, rows, update)
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.row_loss):
                total += self._backward(self._batch([rows[place] for place in places]), 1 / num_labels)
        return float(self.accelerator.reduce(total, "sum"))

    def _backward(self, batch: dict[str, Tensor], share: float) -> Tensor:
        """Add the gradients of one micro batch; return its part of the step's loss. `share`: one over all labels."""

        def backward(loss: Tensor) -> None:
            # Gradients are averaged over processes; their sum is wanted.
            self.accelerator.backward(loss * self.accelerator.num_processes)

        if self.config.row.estimator == "rloo":
            assert self.routing is not None
            return backward_over_draws(lambda: self.row_loss(batch), backward, self.routing, share) * share
        loss = self.row_loss(batch).sum() * share
        backward(loss)
        return loss.detach()

    def _tell_routers(self, places: list[int], rows: list[Row], update: int) -> None:
        """Say which rows of the step a micro batch holds, so that chance and penalties do not depend on the split.

        A row's key is a function of the seed, the update and the row's place in the step.
        """
        if self.routing is None:
            return
        lengths = tuple(len(rows[place].ids) for place in places)
        self.routing.share = (sum(lengths) / sum(len(row.ids) for row in rows), len(places) / len(rows))
        self.routing.loss_scale = self._gradient_scale() * self.accelerator.num_processes
        self.routing.rows = tuple(mixed(self.train.seed, update, place) for place in places)
        self.routing.lengths = lengths

    def _add_penalties(self) -> tuple[float, list[float]]:
        """Add the gradients of penalties that read weights, once a step.

        Return what all penalties added to the loss, those that read routing included, and how alike the down and the up
        experts are: the two halves of D2MoRA's penalty, unweighted.
        """
        total = sum(self.routing.take_values().values()) if self.routing else 0.0
        weights = {penalty.kind: penalty.weight for penalty in self.config.weight_penalties}
        diversity = weights.pop("diversity_cos", 0.0)
        with torch.set_grad_enabled(diversity > 0):
            halves = orthogonality(self.model)
        terms: list[Tensor] = [diversity * (halves[0] + halves[1])]
        terms += [weight * weight_penalty(self.model, kind) for kind, weight in weights.items()]
        for term in terms:
            total += float(term.detach())
            if term.requires_grad:
                self._add_gradient(term)
        return total, [float(half.detach()) for half in halves]

    def _add_gradient(self, value: Tensor) -> None:
        trained = list(self.parameters.values())
        gradients = torch.autograd.grad(value * self._gradient_scale(), trained, allow_unused=True)
        for tensor, gradient in zip(trained, gradients, strict=True):
            if gradient is not None:
                tensor.grad = gradient if tensor.grad is None else tensor.grad + gradient

    def _gradient_scale(self) -> float:
        scaler = self.accelerator.scaler
        return float(scaler.get_scale()) if scaler else 1.0

    def _clip(self) -> float:
        limit = self.train.max_grad_norm or math.inf
        return float(self.accelerator.clip_grad_norm_(list(self.parameters.values()), limit))

    def _count_bad(self, is_finite: bool, update: int, loss: float, norm: float) -> None:
        if is_finite:
            self._bad_in_a_row = 0
            return
        self.bad_steps += 1
        self._bad_in_a_row += 1
        if self._bad_in_a_row >= MAX_BAD_IN_A_ROW:
            bad = [name for name, tensor in self.parameters.items() if not _is_finite(tensor.grad)]
            where = bad[0] if bad else "no gradient, but the loss"
            raise NotFinite(
                f"step {update + 1}: loss {loss}, gradient norm {norm}, {self._bad_in_a_row} bad steps in a row; first "
                f"not finite: {where}; lower train.learning_rate, then --resume"
            )

    def _micro_batches(self, rows: list[Row]) -> Iterator[list[int]]:
        """The places in `rows` of this process's share, rows of like length together."""
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        mine = sorted(range(len(rows)), key=lambda place: len(rows[place].ids))[process::processes]
        for start in range(0, len(mine), self.micro_batch):
            yield mine[start : start + self.micro_batch]

    def _batch(self, rows: list[Row]) -> dict[str, Tensor]:
        return {name: tensor.to(self.accelerator.device) for name, tensor in collate(rows, self.pad).items()}

    def _random_seed(self, update: int) -> int:
        seed = self.train.seed * 1_000_003 + update
        return (seed * self.accelerator.num_processes + self.accelerator.process_index) % (1 << 63)

    def _evaluate_and_log(self, step: int, display: StepDisplay) -> dict[str, float]:
        losses = self.evaluate()
        if losses and self.accelerator.is_main_process:
            self._append({"step": step, "eval_loss": losses})
            self.accelerator.log({f"eval_loss/{task}": loss for task, loss in losses.items()}, step=step)
            display.evaluation(step, losses)
        return losses

    def _log(self, step: int, metrics: dict[str, float], display: StepDisplay) -> None:
        if not self.accelerator.is_main_process:
            return
        display.step(step, metrics)
        if step % self.train.log_every == 0 or step == self.total_steps:
            finite = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
            self._append({"step": step, **finite})
            self.accelerator.log(metrics, step=step)

    def _append(self, line: dict[str, object]) -> None:
        with self.folder.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _memory(self) -> int:
        """Peak bytes so far: allocated on the GPU, or resident in this process on a CPU."""
        if self.accelerator.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """The first signal asks for a checkpoint after the step; the second ends the process at once."""

        def note(number: int, frame: FrameType | None) -> None:
            if self._stop:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            self._stop.append(number)

        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        before = {number: signal.signal(number, note) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _is_finite(gradient: Tensor | None) -> bool:
    return gradient is None or bool(torch.isfinite(gradient).all())


__all__ = ["MAX_BAD_IN_A_ROW", "Training"]
