"""Which of base and expert does better on a row: what a gate between them is taught (GE/LE/GN, arXiv 1811.00056).

Asked of the model as it is in this step, in two passes without a gradient: the base alone, and every expert counted
whole, whatever its gate says. A row on which both are as good is the base's.
"""

import torch
from torch import Tensor

from qd2mora.data import MicroBatch
from qd2mora.mixture.phases import Phase
from qd2mora.objectives import Reference
from qd2mora.training.micro_batches import MicroBatches

KIND = "base_or_expert"


def expert_is_better(batches: MicroBatches, part: MicroBatch) -> Tensor:
    """Return 1 for each line on which the experts do better than the base, else 0, (lines,) int64."""
    routing, model = batches.routing, batches.model
    assert routing is not None
    with Reference(model, has_start=False).speaking():
        of_base = batches.row_losses(part)
    phase, is_counted, is_training = routing.phase, routing.is_counted, model.training
    routing.phase, routing.is_counted = Phase(is_open=True), False
    model.eval()
    try:
        with torch.no_grad():
            of_experts = batches.row_losses(part)
    finally:
        routing.phase, routing.is_counted = phase, is_counted
        model.train(is_training)
    return (of_experts < of_base).long()


__all__ = ["KIND", "expert_is_better"]
