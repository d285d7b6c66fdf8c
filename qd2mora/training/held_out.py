"""The losses of held-out rows while a run goes on; routers are watched on the way.

Nothing is changed by an evaluation, so one that ran out of memory is done again on smaller micro batches, as a step is.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from qd2mora.data import Row
from qd2mora.memory.faults import tried
from qd2mora.memory.loss import labelled_states

if TYPE_CHECKING:  # the loop evaluates
    from qd2mora.training.loop import Training


def held_out_losses(training: "Training") -> dict[str, float]:
    """Return the loss per labelled token of each task that holds rows out, in nats. Raises WillNotFit."""
    training.model.eval()
    while True:
        sums, is_short = tried(lambda: _sums(training))
        if sums is None:
            training.abandon()
        (short,) = training.processes.sum_numbers([float(is_short)])
        if sums is not None and not short:
            break
        training.halve_micro_batch(f"the evaluation after step {training.progress.step}")
    training.model.train()
    names = [task.task.name for task in training.tasks if task.validation]
    summed = training.processes.sum_numbers(sums)
    return {name: total / labels for name, total, labels in zip(names, summed[::2], summed[1::2], strict=True)}


def _sums(training: "Training") -> list[float]:
    """Return this process's summed loss and number of labels of each task that holds rows out, one after the other."""
    sums = []
    with training.live.watching():
        for task in training.tasks:
            if task.validation:
                sums += _loss_of(training, task.validation)
            elif training.progress.step > 0:  # a step has shown that micro batches of this size fit
                _run_through(training, training.live.stand_ins(task))
    return sums


def _loss_of(training: "Training", rows: Sequence[Row]) -> list[float]:
    """Return the summed loss of this process's rows, and the number of their labels."""
    sums = torch.zeros(2, dtype=torch.float64)
    for part in training.micro_batches(rows, 0):
        training.tell_routers(part)
        with torch.no_grad():
            loss = training.row_losses(part).sum().double().cpu()
        sums += torch.stack([loss, torch.tensor(float(part.num_labels))]) * part.weight
        training.watchdog.beat()
    return [float(number) for number in sums]


def _run_through(training: "Training", rows: list[Row]) -> None:
    """Let rows pass the routers, without a loss."""
    for part in training.micro_batches(rows, 0):
        training.tell_routers(part)
        batch = {name: tensor.to(training.processes.device) for name, tensor in part.collated(training.pad).items()}
        with torch.no_grad():
            labelled_states(training.model, batch)
        training.watchdog.beat()


__all__ = ["held_out_losses"]
