"""How much each expert of a trained mixture is used, measured on rows: what Sub-MoE weighs experts by.

The share of choices where a router selects, the mean gate where every expert is used; tasks count alike.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qd2mora.base.passes import last_states
from qd2mora.composition.calibration import ROWS, parts_of, sampled
from qd2mora.errors import InputRefused
from qd2mora.evaluation.answering import batch_of
from qd2mora.evaluation.subject import open_subject
from qd2mora.inspection import RoutingWatch
from qd2mora.recipe import Recipe


@dataclass(frozen=True)
class ExpertUse:
    """Each linear's shares (E,) float64, which sum to one, and the rows they were measured on."""

    shares: Mapping[str, Tensor]
    rows: int


@torch.no_grad()
def measured_use(folder: str, recipe: Recipe) -> ExpertUse:
    """Run a recipe's rows through a mixture on its base. Raises InputRefused, DamagedFile."""
    subject = open_subject(folder)
    rows = sampled(recipe, subject.tokenizer, ROWS)
    watch = RoutingWatch(subject.model, len(recipe.data.tasks))
    with watch.watching():
        for part in parts_of(rows):
            batch = batch_of(subject, part, "right")
            subject.route(batch)
            last_states(subject.plain, batch)
    shares = {}
    for (name, role), router in watch.routers.items():
        measures = router.measured()
        if measures is None:
            raise InputRefused(f"--on: the rows of the recipe are empty: the {role} router of {name} saw no token")
        load = torch.tensor(measures.load, dtype=torch.float64)
        shares[name] = load / load.sum()
    return ExpertUse(shares, len(rows))


__all__ = ["ExpertUse", "measured_use"]
