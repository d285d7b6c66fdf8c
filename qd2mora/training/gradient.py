"""The gradient of a step, and what is asked of it before it touches the weights.

It is normalised by the labelled tokens of the whole step, over all micro batches and processes; the gradient of the
penalties that read weights is added once. The first two updates prove that gradients flow where the recipe says and
nowhere else. A step whose loss or gradient norm is not finite is skipped: weights and moments stay, the data moves on,
the step is counted.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qd2mora.data import MicroBatch, Row
from qd2mora.errors import NotFinite
from qd2mora.memory.by_layer import LayerByLayer
from qd2mora.mixture import MixtureConfig, mixture_layers, penalty_terms
from qd2mora.mixture.parts import part_of
from qd2mora.objectives import told
from qd2mora.recipe.train import LearnedRouting
from qd2mora.training.clock import Watchdog
from qd2mora.training.estimator import backward_over_draws
from qd2mora.training.growth import Opening
from qd2mora.training.labels import KIND, expert_is_better
from qd2mora.training.micro_batches import Course, MicroBatches, key_of
from qd2mora.training.progress import Progress
from qd2mora.training.rollouts import Rollouts
from qd2mora.training.stages import Stages
from qd2mora.training.updates import add_gradient

MAX_BAD_IN_A_ROW = 3
MAX_BAD_SHARE = 0.01
FEWEST_BAD_FOR_SHARE = 10
"""Below so many bad steps their share says nothing."""
LARGEST_SCALE, SMALLEST_SCALE = 2.0**24, 1.0
# As torch's GradScaler has it.
STEPS_TO_GROW = 2000


@dataclass(frozen=True)
class Penalties:
    """What all penalties added to a step's loss, and how alike experts are: both halves of D2MoRA's, unweighted."""

    total: float
    down: float
    up: float


@dataclass
class StepGradient:
    """Leaves a step's gradient in the parameters."""

    batches: MicroBatches
    course: Course
    config: MixtureConfig
    max_norm: float | None
    learned: LearnedRouting
    """How routers that sample learn of their draws."""
    opening: Opening
    stages: Stages = field(default_factory=Stages)
    rollouts: Rollouts | None = None
    """Where the rows of a step are answers that the run writes itself."""
    _measures: list[Tensor] = field(default_factory=list)
    """What the objective measured of the step's micro batches, on this process."""
    _baseline: float = 0.0
    _whole: tuple[int, int] = (1, 1)
    """Tokens and lines of the step, on all processes."""

    def prepare(self, rows: list[Row], watchdog: Watchdog) -> list[Row]:
        """Take what the objective needs of a step as a whole, before its gradient; return the rows that are learned.

        Raises WillNotFit, InputRefused.
        """
        if self.rollouts is not None:
            # Answers are written token by token, at no pace that a micro batch of training could tell.
            with watchdog.paused():
                return self.rollouts.of(rows, self.course.first_of(self.batches.progress.step))
        self._baseline = self.batches.baseline(rows, watchdog.goes_on)
        return rows

    def accumulate(self, rows: list[Row], beat: Callable[[], None]) -> Tensor:
        """Add the gradients of this process's rows; return their part of the step's loss.

        `beat` is called after each micro batch, or where they take turns in each layer, after each group of them.
        """
        batches, step = self.batches, self.batches.progress.step
        # Dropout draws from torch's generator: anew for each step, or a resumed run would draw other numbers.
        torch.manual_seed(key_of(batches.seed, "step", step, batches.processes.index))
        # One over what all rows count, of all processes and micro batches: the split changes no row's weight.
        share = 1 / sum(batches.objective.count(row) for row in rows)
        self._whole = sum(row.num_tokens for row in rows), len(rows) * batches.objective.lines
        # A tensor on the device: a Python sum would wait for it after every micro batch.
        total = torch.zeros((), device=batches.processes.device)
        self._measures = []
        if batches.routing is not None:
            batches.routing.forget()
        for group in batches.in_groups(batches.of(rows, self.course.first_of(step), self.course.capacity)):
            for loss in self.backward_by_layer(group, share):
                total += loss
            beat()
        return total

    def backward_by_layer(self, group: list[MicroBatch], share: float) -> Iterator[Tensor]:
        """Add the gradients of micro batches that take turns in each layer, or of a single one; yield their losses."""
        if len(group) == 1:
            self._tell_routers(group[0])
            yield self.backward(group[0], share * group[0].weight)
            return
        layers = LayerByLayer(self.batches.model)
        with self.batches.computing():
            for part in group:
                self._tell_routers(part)
                layers.read(self.batches.collated(part))
            layers.forward()
        for number, part in enumerate(group):
            with layers.last_states_of(number):
                yield self.backward(part, share * part.weight)
        layers.backward()

    def _tell_routers(self, part: MicroBatch) -> None:
        batches, (tokens, lines) = self.batches, self._whole
        batches.tell_routers(part)
        if batches.routing is not None:
            # Penalties that read routing are means over tokens or rows; these shares make them the step's.
            parts = (part.num_tokens / tokens, len(part.rows) / lines)
            batches.routing.share = (part.weight * parts[0], part.weight * parts[1])
            batches.routing.loss_scale = batches.progress.loss_scale or 1.0

    def backward(self, part: MicroBatch, share: float) -> Tensor:
        """Add the gradients of one micro batch; return its part of the loss. `share`: one over all that counts."""
        batches = self.batches
        if any(penalty.kind == KIND and penalty.weight for penalty in self.config.routing_penalties):
            assert batches.routing is not None
            batches.routing.better = expert_is_better(batches, part)

        def backward(loss: Tensor) -> None:
            batches.updater.backward(loss * (batches.progress.loss_scale or 1.0))

        if any(gate.select == "sample" for gate in self.config.routers.values()):
            assert batches.routing is not None
            routing, of = batches.routing, (self.learned.draws, self.learned.estimator)
            return backward_over_draws(lambda: self._losses(part), backward, routing, share, *of) * share
        loss = self._losses(part).sum() * share
        backward(loss)
        return loss.detach()

    def _losses(self, part: MicroBatch) -> Tensor:
        """Return the loss of each row of a micro batch, (rows,), and note what is measured beside it."""
        said = self.batches.said(part, self._baseline)
        if self.batches.objective.names:
            self._measures.append(self.batches.objective.measures(said) * part.weight)
        return self.batches.objective.losses(said)

    def measures(self) -> dict[str, float]:
        """Return what the objective measured of the whole step, on all processes."""
        of_answers = {} if self.rollouts is None else self.rollouts.measures
        if not self.batches.objective.names:
            return of_answers
        sums = torch.zeros(len(self.batches.objective.names), 2, device=self.batches.processes.device)
        for measured in self._measures:  # none, where a process had no micro batch
            sums += measured
        return of_answers | told(self.batches.objective.names, self.batches.processes.sum_numbers(list(sums.flatten())))

    def finish(self) -> tuple[float, Penalties]:
        """Make the step's gradient of what all processes added: whole, proven and clipped; return its norm before.

        Raises NotFinite where gradients do not flow as they should.
        """
        # Sums, no mean: each process has divided by the labels of the whole step already.
        self.batches.processes.sum_gradients(self.batches.updater.parameters)
        self._still_routers()
        self._unscale()
        # Before the penalties: theirs would hide an expert that is detached from the loss.
        # Where all answers of the first steps are as good as one another nothing flows, and that is no fault.
        if self.rollouts is None:
            prove_flow(self.batches.model, self.batches.updater.parameters, self.batches.progress)
        penalties = self._add_penalties()
        self.stages.freeze(self.batches.updater.parameters, self.batches.progress.step)
        self.opening.freeze(self.batches.progress.step)
        parameters = list(self.batches.updater.parameters.values())
        # A limit of infinity clips nothing and measures the norm all the same.
        return float(nn.utils.clip_grad_norm_(parameters, self.max_norm or math.inf)), penalties

    def blame(self, rows: list[Row]) -> str:
        """Name what is the first not to be finite where a step's first micro batch runs again."""
        # Without packing and keys of its own: a number that is not finite is found in any arrangement of the rows.
        part = next(self.batches.of(rows, 0))
        self.batches.tell_routers(part)
        with torch.no_grad():
            return blame(self.batches.model, self.batches.updater.parameters, lambda: self.batches.row_losses(part))

    def _still_routers(self) -> None:
        """Give routers that uniform gates leave alone a gradient of zero: their moments begin with the others'."""
        if self.batches.routing is None or not self.batches.routing.phase.is_uniform:
            return
        for name, parameter in self.batches.updater.parameters.items():
            if parameter.grad is None and part_of(name) == "router":
                parameter.grad = torch.zeros_like(parameter)

    def _unscale(self) -> None:
        scale = self.batches.progress.loss_scale
        if scale is not None:
            # Before anything else reads the gradients: norm, limit and penalties know nothing of the scale.
            for parameter in self.batches.updater.parameters.values():
                if parameter.grad is not None:
                    parameter.grad.mul_(1 / scale)

    def _add_penalties(self) -> Penalties:
        """Add the gradients of penalties that read weights, once a step; sum up those that read routing too."""
        batches, routed = self.batches, 0.0
        if batches.routing is not None:
            routed = sum(batches.routing.take_values().values())
        (total,) = batches.processes.sum_numbers([routed])
        added = torch.zeros((), device=batches.processes.device)
        likeness = {"mixture_A": added.clone(), "mixture_B": added.clone()}
        weights = {penalty.kind: penalty.weight for penalty in self.config.weight_penalties}
        # The penalty's gradient is added whole, once, on every process alike: the sum over processes is behind us.
        # How alike experts are is told of every method, whether it is punished for that or not.
        for kind, weight in ({"diversity_cos": 0.0} | weights).items():
            with torch.set_grad_enabled(weight > 0):
                for name, value, tensors in penalty_terms(batches.model, kind):
                    added += weight * value.detach()
                    if kind == "diversity_cos":
                        likeness[name] += value.detach()
                    if value.requires_grad:
                        add_gradient(weight * value, tensors)
        return Penalties(total + float(added), float(likeness["mixture_A"]), float(likeness["mixture_B"]))


def is_too_bad(progress: Progress) -> bool:
    """Tell whether a run has had three bad steps in a row, or one in a hundred."""
    is_often = progress.bad_steps >= FEWEST_BAD_FOR_SHARE and progress.bad_steps > MAX_BAD_SHARE * progress.step
    return progress.bad_in_a_row >= MAX_BAD_IN_A_ROW or is_often


def lower_scale(progress: Progress) -> bool:
    """Halve the loss scale after an overflow of float16 gradients; False where it cannot go lower, or there is none."""
    if progress.loss_scale is None or progress.loss_scale <= SMALLEST_SCALE:
        return False
    # Powers of two: scaling and unscaling round nothing.
    progress.loss_scale /= 2
    progress.applied_at_scale = 0
    return True


def raise_scale(progress: Progress) -> None:
    """Count an update; double the loss scale after many without an overflow."""
    if progress.loss_scale is None:
        return
    progress.applied_at_scale += 1
    if progress.applied_at_scale >= STEPS_TO_GROW and progress.loss_scale < LARGEST_SCALE:
        progress.loss_scale *= 2
        progress.applied_at_scale = 0


def prove_flow(model: nn.Module, parameters: dict[str, nn.Parameter], progress: Progress) -> None:
    """Check before update 0 and 1 that gradients are where they should be.

    At update 0 the up experts are zero, so nothing below them has a gradient yet; at update 1 everything has one, and
    the experts' is not zero (float16 may round a small one to zero). Frozen weights never have any.

    Raises NotFinite naming the tensor.
    """
    if progress.applied > 1:
        return
    frozen = [name for name, tensor in model.named_parameters() if not tensor.requires_grad and tensor.grad is not None]
    if frozen:
        raise NotFinite(f"{frozen[0]} is frozen and got a gradient; nothing was updated")
    if progress.applied == 0:
        if not any(_is_moving(tensor) for tensor in parameters.values()):
            raise NotFinite("no trainable tensor got a gradient: the loss does not depend on the adapter")
        return
    banks = {
        id(layer.tensors(name)[bank])
        for layer in mixture_layers(model).values()
        for name in layer.active_adapters
        for bank in ("mixture_A", "mixture_B")
    }
    for name, tensor in parameters.items():
        is_still = id(tensor) in banks and progress.loss_scale is None and not _is_moving(tensor)
        if tensor.grad is None or is_still:
            raise NotFinite(f"{name} is to be trained and got no gradient in the first two steps")


def blame(model: nn.Module, parameters: dict[str, nn.Parameter], forward: Callable[[], object]) -> str:
    """Name the module whose output is the first that is not finite, else the last tensor with such a gradient.

    `forward` runs the model again. Backward runs from the loss down, so the last layer is where trouble began.
    """
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            first = output[0] if isinstance(output, tuple) and output else output
            if isinstance(first, Tensor) and not bool(torch.isfinite(first).all()):
                found.append(name)

        return hook

    named = [(name, module) for name, module in model.named_modules() if name]
    # Hooks run from the inside out: the first that is found is the innermost module where trouble began.
    handles = [module.register_forward_hook(look(name)) for name, module in named]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    if found:
        return f"the output of {found[0]}"
    bad = [name for name, tensor in parameters.items() if tensor.grad is not None and not tensor.grad.isfinite().all()]
    if bad:
        return f"the gradient of {bad[-1]}"
    return "the loss alone"


def _is_moving(tensor: nn.Parameter) -> bool:
    return tensor.grad is not None and bool(tensor.grad.any())


__all__ = ["Penalties", "StepGradient", "blame", "is_too_bad", "lower_scale", "prove_flow", "raise_scale"]
