"""What is wrong with a routing: all goes to the same experts, or experts are used, or are, nearly all alike."""

from collections.abc import Mapping, Sequence

from qd2mora.inspection.counting import RouterSums
from qd2mora.inspection.measures import RouterMeasures

UNIFORM = 0.94
"""Mean entropy of single tokens' gates, of its maximum, from which on routers hardly choose."""
ALIKE = 0.7
"""Mean |cos| of two experts of a bank from which on it makes little difference which of them is chosen."""

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


def likeness_line(summary: Mapping[str, float | None]) -> str | None:
    """Return a sentence where routers choose next to nothing, or there is next to nothing to choose; else None.

    `summary`: means by name, as in `routing.json`.
    """
    entropy, found = summary.get("entropy"), []
    if entropy is not None and entropy >= UNIFORM:
        found.append(f"routers are near uniform (mean gate entropy {entropy:.1%} of its maximum)")
    for bank in ("down", "up"):
        likeness = summary.get(f"cos_{bank}")
        if likeness is not None and likeness >= ALIKE:
            found.append(f"{bank} experts are alike (mean |cos| {likeness:.2f})")
    # A method without routers is one LoRA by design, and gates that are given by the row's task choose as they should.
    if not found or entropy is None:
        return None
    return (
        f"{' and '.join(found)}: the mixture acts nearly like one LoRA; longer training, a higher train.learning_rate, "
        "a lower temperature of gates (adapter.gates) or adapter.penalties.diversity_cos=1e-2 may tell experts apart; "
        "`qd2mora compare` says whether that pays"
    )


__all__ = ["ALIKE", "UNIFORM", "Measured", "collapse_line", "collapsed", "likeness_line"]
