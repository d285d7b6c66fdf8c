"""What was watched, summed up: means for `metrics.jsonl`, and the whole report of an adapter's routers and experts."""

from collections.abc import Sequence

from torch import Tensor, nn

from qd2mora.inspection.alarm import Measured, collapse_line, collapsed
from qd2mora.inspection.counting import RouterSums, RoutingWatch
from qd2mora.inspection.experts import measure_bank, project
from qd2mora.inspection.measures import RouterMeasures, mean_of_known
from qd2mora.inspection.routing_report import (
    BankReport,
    ExpertPoint,
    Projection,
    RouterReport,
    RoutingReport,
    Summary,
)
from qd2mora.mixture import MixtureLinear, mixture_layers, orthogonality

NO_ROUTERS = "this method has no routers: the same update serves every token"


def measured(watch: RoutingWatch) -> Measured:
    """Return the routers that saw tokens, with their measures."""
    pairs = [(router, router.measured()) for router in watch.routers.values()]
    return [(router, measures) for router, measures in pairs if measures is not None]


def summary(found: Measured, model: nn.Module) -> Summary:
    """Return the means over routers that `metrics.jsonl` keeps of an evaluation, and the likeness of experts.

    entropies within 0 and 1; loads relative to an equal share, of the worst router; dead experts and collapsed routers
    counted; mean |cos| of two experts of a bank.
    """
    # Over a single expert every measure is what it must be, and would pull the means there.
    choosing = [(router, each) for router, each in found if router.num_experts > 1]
    each = [measures for _, measures in choosing]
    return {
        "routers": len(found),
        "entropy": mean_of_known(measures.entropy for measures in each),
        "entropy_of_mean": mean_of_known(measures.entropy_of_mean for measures in each),
        "max_load": max((measures.max_load for measures in each), default=None),
        "min_load": min((measures.min_load for measures in each), default=None),
        "dead_experts": sum(len(measures.dead) for measures in each),
        "mutual_information": mean_of_known(measures.mutual_information for measures in each),
        **mean_cosines(model),
        "collapsed": len(collapsed(found)),
    }


def mean_cosines(model: nn.Module, adapter: str = "default") -> Summary:
    """Return the mean |cos| over the pairs of down and of up experts; None where no bank has two of one rank."""
    pairs = num_pairs(model, adapter)
    found: Summary = {}
    for bank, half in zip(("down", "up"), orthogonality(model, adapter), strict=True):
        found[f"cos_{bank}"] = None
        if pairs[bank]:
            found[f"cos_{bank}"] = float(half.detach()) / pairs[bank]
    return found


def num_pairs(model: nn.Module, adapter: str = "default") -> dict[str, int]:
    """Return how many pairs of experts each half of the diversity penalty sums over."""
    pairs = {"down": 0, "up": 0}
    for layer in mixture_layers(model).values():
        for bank, name in (("down", "mixture_A"), ("up", "mixture_B")):
            tensor = layer.tensors(adapter).get(name)
            if tensor is not None and tensor.dim() == 3:
                pairs[bank] += tensor.shape[0] * (tensor.shape[0] - 1) // 2
    return pairs


def routing_report(
    watch: RoutingWatch, model: nn.Module, tasks: Sequence[str], rows: dict[str, dict[str, int]], step: int | None
) -> RoutingReport:
    """Return the whole report. `rows`: task to how many rows of which source were looked at."""
    found = measured(watch)
    layers = {name: layer for name, layer in mixture_layers(model).items() if watch.adapter in layer.mixture_spec}
    return RoutingReport(
        step=step,
        tasks=list(tasks),
        rows=rows,
        note=None if found else NO_ROUTERS,
        alarm=collapse_line(found),
        summary=summary(found, model) if found else mean_cosines(model, watch.adapter),
        pairs=num_pairs(model, watch.adapter),
        routers=[_router_report(router, measures) for router, measures in found],
        banks=_banks(layers, watch.adapter),
        projection=_projection(layers, watch.adapter),
    )


def _router_report(router: RouterSums, measures: RouterMeasures) -> RouterReport:
    return RouterReport(
        module=router.module,
        layer=router.layer,
        kind=router.kind,
        role=router.role,
        experts=router.num_experts,
        at_once=router.at_once if router.is_sparse else None,
        collapsed=router.is_collapsed(measures),
        measures=measures,
    )


def _banks(layers: dict[str, MixtureLinear], adapter: str) -> list[BankReport]:
    found = []
    for name, layer in layers.items():
        place = layer.mixture_spec[adapter].place
        for bank, rows, ranks in _rows_of(layer, adapter):
            if len(ranks) > 1:
                measures = measure_bank(rows, ranks)
                found.append(BankReport(name, place.layer, place.kind, bank, len(ranks), measures))
    return found


def _rows_of(layer: MixtureLinear, adapter: str) -> list[tuple[str, Tensor, tuple[int, ...]]]:
    """Return the banks as rows, (ranks, long side), with the rank of each expert; up experts transposed."""
    tensors, step = layer.tensors(adapter), layer.mixture_spec[adapter].step
    found = []
    for bank, name, ranks in (("down", "mixture_A", step.ranks_down), ("up", "mixture_B", step.ranks_up)):
        tensor = tensors.get(name)
        if tensor is None:
            continue
        rows = tensor
        if bank == "up":
            # Columns of B are what an up expert writes: they are compared as rows of A are, along the long side.
            rows = tensor.mT
        if tensor.dim() == 3:
            rows = rows.flatten(0, 1)
            ranks = (len(rows) // len(tensor),) * len(tensor)
        found.append((bank, rows, ranks))
    return found


def _projection(layers: dict[str, MixtureLinear], adapter: str) -> list[Projection]:
    """Return a picture of each kind of linear and each bank, over all layers whose experts have one size."""
    groups: dict[tuple[str, str, int], list[tuple[int, int, Tensor]]] = {}
    for layer in layers.values():
        place = layer.mixture_spec[adapter].place
        for bank, rows, ranks in _rows_of(layer, adapter):
            if len(ranks) > 1 and len(set(ranks)) == 1:
                for expert, part in enumerate(rows.split(list(ranks))):
                    groups.setdefault((place.kind, bank, part.numel()), []).append((place.layer, expert, part))
    pictures = []
    for (kind, bank, _), experts in groups.items():
        places, explained = project([part for _, _, part in experts])
        points = [
            ExpertPoint(layer, expert, *place)
            for (layer, expert, _), place in zip(experts, places, strict=True)
            if place is not None
        ]
        if points:
            pictures.append(Projection(kind, bank, explained, points))
    return pictures


__all__ = ["NO_ROUTERS", "measured", "routing_report", "summary"]
