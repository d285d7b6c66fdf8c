"""The part of a run's page that is about routing and experts."""

from collections.abc import Callable, Iterable

from qd2mora.inspection import RoutingReport
from qd2mora.inspection.measures import RouterMeasures, mean_of_known
from qd2mora.inspection.routing_report import BankReport, RouterReport
from qd2mora.report.cells import grouped, written
from qd2mora.report.chart import Chart, KeyEntry, key_html
from qd2mora.report.curves import Series, line_chart
from qd2mora.report.maps import Dot, Usage, scatter, usage_key, usage_map
from qd2mora.report.page import card, escape, folded, grid, paragraph, table
from qd2mora.report.run_contents import RunContents

ROLES = {
    "down": "router over down experts (A)",
    "up": "router over up experts (B)",
    "core": "router over cores",
    "rank": "gate over single ranks",
}
BANKS = {"down": "down experts (A)", "up": "up experts (B)"}
SHORT_BANKS = {"down": "down (A)", "up": "up (B)"}
MOST_TASKS = 24
MOST_MAP_EXPERTS = 32
MOST_KEY_EXPERTS = 16
ENTROPY_NOTE = "entropy of single tokens' gates (1: all experts alike, 0: one alone)"
INFORMATION_NOTE = "information between task and expert by the gates' weights, in nats (0: tasks are routed alike)"


def routing_section(run: RunContents) -> str:
    """Return who routed where: heat maps, entropy and information by layer, all numbers."""
    routing = run.routing
    if routing is None:
        return paragraph("No routing report yet: `qd2mora inspect` makes it once the run has finished.")
    if routing.note:
        return paragraph(routing.note.capitalize() + ".")
    return (
        paragraph(_seen(routing))
        + paragraph("Colours tell how far the mean gate of a task's tokens is from an equal share among experts:")
        + usage_key()
        + grid(_maps(routing), "maps")
        + grid(_by_layer(routing.routers))
        + folded(f"numbers of all {len(routing.routers)} routers, the least even first", _router_table(routing.routers))
    )


def experts_section(run: RunContents) -> str:
    """Return how alike experts are: over time, bank by bank, and on two axes."""
    routing = run.routing
    if routing is None or not routing.banks:
        return paragraph("No bank of several experts to compare.")
    return grid([*_likeness_over_time(run), _bank_card(routing.banks)]) + _pictures(routing)


def map_of(routing: RoutingReport, routers: list[RouterReport]) -> Chart:
    """Return the heat map of routers of one kind and role, one a layer, over the first tasks."""
    usage = Usage(
        [router.layer for router in routers],
        routing.tasks[:MOST_TASKS],
        [router.measures.usage[:MOST_TASKS] for router in routers],
    )
    return usage_map(f"{routers[0].kind}, {ROLES[routers[0].role]}", usage)


def mapped_groups(routing: RoutingReport) -> list[list[RouterReport]]:
    """Return the routers that share a heat map: of one kind, role and number of experts, if few enough to tell."""
    groups = grouped(routing.routers, lambda each: (each.kind, each.role, each.experts))
    return [routers for routers in groups.values() if 1 < routers[0].experts <= MOST_MAP_EXPERTS]


def likeness_chart(run: RunContents) -> Chart:
    """Return how alike experts of each bank were at every step."""
    lines = [Series(name, run.likeness(bank), number) for number, (bank, name) in enumerate(BANKS.items())]
    return line_chart("likeness of experts over time", lines, low=0.0, high=1.0)


def entropy_chart(routers: list[RouterReport], role: str) -> Chart:
    """Return the entropy of single tokens' gates by layer, a line a kind of linear."""
    title = f"entropy by layer, {ROLES[role]}"
    return line_chart(title, _lines_by_layer(routers, role, lambda each: each.entropy), "layer", low=0.0, high=1.0)


def _information_chart(routers: list[RouterReport], role: str) -> Chart:
    title = f"information by layer, {ROLES[role]}"
    lines = _lines_by_layer(routers, role, lambda each: each.mutual_information_of_weights)
    return line_chart(title, lines, "layer", low=0.0)


def _lines_by_layer(
    routers: list[RouterReport], role: str, measure: Callable[[RouterMeasures], float | None]
) -> list[Series]:
    lines = []
    for number, (kind, group) in enumerate(_choosing(routers, role).items()):
        pairs = [(router.layer, measure(router.measures)) for router in group]
        points = [(layer, value) for layer, value in pairs if value is not None]
        lines.append(Series(kind, points, number, has_dots=True))
    return lines


def _choosing(routers: list[RouterReport], role: str) -> dict[str, list[RouterReport]]:
    """Return the routers of a role that have several experts, by kind of linear."""
    chosen = [router for router in routers if router.role == role and router.experts > 1]
    return grouped(chosen, lambda each: each.kind)


def _seen(routing: RoutingReport) -> str:
    sources: dict[str, int] = {}
    for counted in routing.rows.values():
        for source, number in counted.items():
            sources[source] = sources.get(source, 0) + number
    rows = " and ".join(f"{number:,} {source.replace(' ', '-')} rows" for source, number in sources.items())
    after = ""
    if routing.step is not None:
        after = f" after step {routing.step}"
    return f"Measured on {rows}{after}, padding left out; every task counts alike."


def _maps(routing: RoutingReport) -> Iterable[str]:
    for routers in mapped_groups(routing):
        dead = sum(len(router.measures.dead) for router in routers)
        fallen = sum(router.collapsed for router in routers)
        notes = []
        if dead:
            notes.append(f"{dead} dead experts")
        if fallen:
            notes.append(f"{fallen} of {len(routers)} routers collapsed")
        if len(routing.tasks) > MOST_TASKS:
            notes.append(f"the first {MOST_TASKS} of {len(routing.tasks)} tasks")
        drawn = map_of(routing, routers)
        yield card(drawn.title, drawn.html(), "; ".join(notes))


def _by_layer(routers: list[RouterReport]) -> Iterable[str]:
    for role in dict.fromkeys(router.role for router in routers):
        if _choosing(routers, role):
            entropy, information = entropy_chart(routers, role), _information_chart(routers, role)
            yield card(entropy.title, entropy.html(), ENTROPY_NOTE)
            yield card(information.title, information.html(), INFORMATION_NOTE)


def _router_table(routers: list[RouterReport]) -> str:
    headings = (
        *("router", "gate", "tokens' entropy", "mean gate's", "effective experts", "most", "least", "dead"),
        *("information, chosen", "by weight"),
    )
    return table(headings, map(_router_row, sorted(routers, key=lambda router: router.evenness)))


def _router_row(router: RouterReport) -> list[str]:
    measures = router.measures
    dead = escape(", ".join(map(str, measures.dead)) or "none")
    if router.collapsed:
        dead += " collapsed"
    return [
        escape(router.module.removeprefix("model.layers.")),
        escape(router.role),
        written(measures.entropy),
        written(measures.entropy_of_mean),
        f"{measures.effective_experts:.2f} <small>of {router.experts}</small>",
        f"{measures.max_load / router.experts:.1%}",
        f"{measures.min_load / router.experts:.1%}",
        dead,
        written(measures.mutual_information),
        written(measures.mutual_information_of_weights),
    ]


def _likeness_over_time(run: RunContents) -> Iterable[str]:
    chart = likeness_chart(run)
    if chart.drawing:
        note = "mean |cos| over all pairs of experts of a bank, flattened; what D2MoRA's penalty lowers"
        yield card(chart.title, chart.html(), note)


def _bank_card(banks: list[BankReport]) -> str:
    rows = []
    for (kind, bank), group in grouped(banks, lambda each: (each.kind, each.bank)).items():
        measures = [each.measures for each in group]
        angle = mean_of_known(each.mean_angle for each in measures)
        rows.append(
            [
                escape(kind),
                SHORT_BANKS[bank],
                written(mean_of_known(each.mean_cosine for each in measures)),
                written(mean_of_known(each.mean_overlap for each in measures)),
                "" if angle is None else f"{angle:.0f}\N{DEGREE SIGN}",
                written(mean_of_known(each.effective_rank for each in measures), ".1f"),
            ]
        )
    note = (
        "means over layers. Overlap: mean squared cosine of the principal angles between two experts' subspaces, 1 "
        "where they span the same; effective rank: of a whole bank's stacked experts"
    )
    return card(
        "likeness by bank", table(("linear", "bank", "|cos|", "overlap", "angle", "effective rank"), rows), note
    )


def _pictures(routing: RoutingReport) -> str:
    if not routing.projection:
        return ""
    cards = []
    for picture in routing.projection:
        dots = [
            Dot(each.x, each.y, each.expert, f"layer {each.layer}, expert {each.expert}") for each in picture.points
        ]
        axes = [f"{word}: {share:.0%}" for word, share in zip(("across", "up"), picture.explained, strict=False)]
        title = f"{picture.kind}, {BANKS[picture.bank]}"
        across, up = [*axes, "", ""][:2]
        cards.append(card(title, scatter(title, dots, (across, up)).html()))
    lead = (
        "Experts of all layers on the two main axes of each bank (PCA of unit vectors; axes tell their share of the "
        "variance). Experts that learned the same lie on one another."
    )
    most = 1 + max(each.expert for picture in routing.projection for each in picture.points)
    names = [KeyEntry(f"expert {number}", number) for number in range(min(most, MOST_KEY_EXPERTS))]
    return paragraph(lead) + key_html(names, as_boxes=True) + grid(cards, "small")


__all__ = [
    "BANKS",
    "ROLES",
    "entropy_chart",
    "experts_section",
    "likeness_chart",
    "map_of",
    "mapped_groups",
    "routing_section",
]
