"""Least squares layer by layer: each layer's statistics come from a model whose earlier layers are static already.

What an earlier layer misses is then part of what a later one is fitted to, as in RegMean++ (arXiv 2508.03121). One
pass over the calibration rows for each decoder layer.
"""

from peft import PeftModel

from qd2mora.merging import core_lsq
from qd2mora.merging.static_updates import of_cores, replaced
from qd2mora.merging.statistics import balanced, collect
from qd2mora.merging.strategy_inputs import Batches
from qd2mora.mixture import mixture_layers
from qd2mora.mixture.low_rank import LowRank
from qd2mora.terminal.pace import paced


def sequential(model: PeftModel, batches: Batches) -> dict[str, LowRank]:
    """Return static updates fitted from the first decoder layer to the last."""
    statics: dict[str, LowRank] = {}
    for names in paced("least squares, decoder layers", stages(model)):
        # Layers before these are static already and pass their errors on; these and all later ones are routed still, so
        # what they compute of such inputs is the target.
        with replaced(model, statics):
            moments = collect(model, batches, names=names, with_mixing=False, weigh=balanced, is_shown=False)
        statics |= of_cores(model, {name: core_lsq.mixing(each) for name, each in moments.items()})
    return statics


def stages(model: PeftModel) -> list[list[str]]:
    """Return the adapted linears, decoder layer by decoder layer, in the order they run."""
    # A decoder layer at a time, not a linear: up to seven times fewer passes, and q, k and v read the same states
    # anyway.
    groups: dict[int, list[str]] = {}
    for name, layer in mixture_layers(model).items():
        number = next((int(part) for part in layer.place_key.split(".") if part.isdigit()), 0)
        groups.setdefault(number, []).append(name)
    return [groups[number] for number in sorted(groups)]


__all__ = ["sequential", "stages"]
