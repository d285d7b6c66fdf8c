"""How unevenly experts are used while a step learns: the load of the worst router, told beside the loss."""

import torch
from torch import nn

from qd2mora.mixture import routing_of
from qd2mora.training.processes import Processes


def max_load(model: nn.Module, processes: Processes) -> float | None:
    """Return the load of the most used expert of all routers, of this step's tokens, where they were counted.

    In multiples of an equal share: a balance loss is least where gates are even, however uneven the choices are, which
    this shows (arXiv 2512.16248). None where nothing is counted.
    """
    routing = routing_of(model)
    if routing is None or routing.phase.sparsity is None:
        return None
    counts = [routing.counts[key].float() for key in sorted(routing.counts)]
    # A process without rows of its own has counted none, and every one has to send as much as the others.
    (most,) = processes.sum_numbers([float(len(counts) > 0)])
    if most < processes.count:
        return None
    used = processes.sum_tensor(torch.cat(counts).double()).split([len(each) for each in counts])
    return max(len(each) * float(each.max() / each.sum().clamp_min(1)) for each in used)


__all__ = ["max_load"]
