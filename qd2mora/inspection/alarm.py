"""The alarm: routers that send nearly everything to the same experts, whatever comes in."""

from collections.abc import Sequence

from qd2mora.inspection.counting import RouterSums
from qd2mora.inspection.measures import RouterMeasures

Measured = Sequence[tuple[RouterSums, RouterMeasures]]


def collapsed(measured: Measured) -> Measured:
    """Return the routers that have collapsed, the worst first."""
    found = [(router, each) for router, each in measured if router.is_collapsed(each)]
    return sorted(found, key=lambda pair: -pair[1].top_share)


def collapse_line(measured: Measured) -> str | None:
    """Return one line that names how many routers have collapsed and the worst of them; None where none has."""
    found = collapsed(measured)
    if not found:
        return None
    router, measures = found[0]
    order = sorted(range(router.num_experts), key=lambda expert: -measures.load[expert])[: router.at_once]
    experts = f"experts {', '.join(map(str, sorted(order)))}"
    if len(order) == 1:
        experts = f"expert {order[0]}"
    return (
        f"routing collapsed in {len(found)} of {len(measured)} routers: {router.module} ({router.role}) sends "
        f"{measures.top_share:.0%} to {experts} of {router.num_experts}; a lower train.learning_rate or a balancing "
        "penalty, such as adapter.penalties.lb_mixtral=1e-2, keeps the others in use"
    )


__all__ = ["Measured", "collapse_line", "collapsed"]
