"""The part of a run's page that is about routing and experts."""

from collections.abc import Iterable
from typing import Any

from qd2mora.report.charts import Series, key, line_chart, scatter, usage_key, usage_map
from qd2mora.report.page import card, escape, folded, grid, paragraph, table
from qd2mora.report.run_files import RunFiles

ROLES = {
    "down": "router over down experts (A)",
    "up": "router over up experts (B)",
    "core": "router over cores",
    "rank": "gate over single ranks",
}
BANKS = {"down": "down experts (A)", "up": "up experts (B)"}
MOST_TASKS = 24
MOST_MAP_EXPERTS = 32


def routing_section(files: RunFiles) -> str:
    """Return who routed where: heat maps, entropy and information by layer, all numbers."""
    content = files.routing
    if content is None:
        return paragraph("No routing report yet: `qd2mora inspect` makes it once the run has finished.")
    if content["note"]:
        return paragraph(content["note"].capitalize() + ".")
    routers = content["routers"]
    return (
        paragraph(_seen(content))
        + paragraph("Colours tell how far the mean gate of a task's tokens is from an equal share among experts:")
        + usage_key()
        + grid(_maps(content), "maps")
        + grid(_by_layer(routers))
        + folded(f"numbers of all {len(routers)} routers, the least even first", _router_table(routers))
    )


def experts_section(files: RunFiles) -> str:
    """Return how alike experts are: over time, bank by bank, and on two axes."""
    content = files.routing
    if content is None or not content["banks"]:
        return paragraph("No bank of several experts to compare.")
    return grid([*_likeness_over_time(files, content), _bank_card(content["banks"])]) + _pictures(content)


def _seen(content: dict[str, Any]) -> str:
    sources: dict[str, int] = {}
    for counted in content["rows"].values():
        for source, number in counted.items():
            sources[source] = sources.get(source, 0) + number
    rows = " and ".join(f"{number:,} {source.replace(' ', '-')} rows" for source, number in sources.items())
    after = "" if content["step"] is None else f" after step {content['step']}"
    return f"Measured on {rows}{after}, padding left out; every task counts alike."


def _maps(content: dict[str, Any]) -> Iterable[str]:
    tasks = content["tasks"][:MOST_TASKS]
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for router in content["routers"]:
        groups.setdefault((router["kind"], router["role"], router["experts"]), []).append(router)
    for (kind, role, experts), routers in groups.items():
        if not 1 < experts <= MOST_MAP_EXPERTS:
            continue
        title = f"{kind}, {ROLES[role]}"
        dead = sum(len(router["dead"]) for router in routers)
        fallen = sum(router["collapsed"] for router in routers)
        notes = [f"{dead} dead experts"] if dead else []
        notes += [f"{fallen} of {len(routers)} routers collapsed"] if fallen else []
        if len(content["tasks"]) > len(tasks):
            notes.append(f"the first {len(tasks)} of {len(content['tasks'])} tasks")
        usage = [router["usage"][: len(tasks)] for router in routers]
        picture = usage_map(title, [router["layer"] for router in routers], tasks, usage)
        yield card(title, picture, "; ".join(notes))


def _by_layer(routers: list[dict[str, Any]]) -> Iterable[str]:
    measures = (
        ("entropy", "entropy of single tokens' gates (1: all experts alike, 0: one alone)", 1.0),
        (
            "mutual_information_of_weights",
            "information between task and expert by the gates' weights, in nats (0: tasks are routed alike)",
            None,
        ),
    )
    for role in dict.fromkeys(router["role"] for router in routers):
        chosen = [router for router in routers if router["role"] == role and router["experts"] > 1]
        kinds = list(dict.fromkeys(router["kind"] for router in chosen))
        for name, note, high in measures if chosen else ():
            lines = [
                Series(kind, _points(chosen, kind, name), number, has_dots=True) for number, kind in enumerate(kinds)
            ]
            title = f"{'entropy' if name == 'entropy' else 'information'} by layer, {ROLES[role]}"
            yield card(title, line_chart(title, lines, "layer", low=0.0, high=high), note)


def _points(routers: list[dict[str, Any]], kind: str, name: str) -> list[tuple[float, float]]:
    return [
        (router["layer"], router[name]) for router in routers if router["kind"] == kind and router[name] is not None
    ]


def _router_table(routers: list[dict[str, Any]]) -> str:
    headings = (
        *("router", "gate", "tokens' entropy", "mean gate's", "effective experts", "most", "least", "dead"),
        *("information, chosen", "by weight"),
    )
    order = sorted(routers, key=lambda router: router["effective_experts"] / router["experts"])
    rows = [
        [
            escape(router["module"].removeprefix("model.layers.")),
            escape(router["role"]),
            _number(router["entropy"]),
            _number(router["entropy_of_mean"]),
            f"{router['effective_experts']:.2f} <small>of {router['experts']}</small>",
            f"{router['max_load'] / router['experts']:.1%}",
            f"{router['min_load'] / router['experts']:.1%}",
            escape(", ".join(map(str, router["dead"])) or "none") + (" collapsed" if router["collapsed"] else ""),
            _number(router["mutual_information"]),
            _number(router["mutual_information_of_weights"]),
        ]
        for router in order
    ]
    return table(headings, rows)


def _likeness_over_time(files: RunFiles, content: dict[str, Any]) -> Iterable[str]:
    lines = []
    for number, bank in enumerate(BANKS):
        pairs = content["pairs"].get(bank)
        points = [(step, half / pairs) for step, half in files.column(f"penalty_{bank}")] if pairs else []
        if points:
            lines.append(Series(BANKS[bank], points, number))
    if lines:
        title = "likeness of experts over time"
        chart = line_chart(title, lines, low=0.0, high=1.0)
        yield card(
            title, chart, "mean |cos| over all pairs of experts of a bank, flattened; what D2MoRA's penalty lowers"
        )


def _bank_card(banks: list[dict[str, Any]]) -> str:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for bank in banks:
        groups.setdefault((bank["kind"], bank["bank"]), []).append(bank)
    rows = [
        [
            escape(kind),
            {"down": "down (A)", "up": "up (B)"}[bank],
            *(_number(_mean(each[name] for each in group)) for name in ("mean_cosine", "mean_overlap")),
            _number(_mean(each["mean_angle"] for each in group), "{:.0f}\N{DEGREE SIGN}"),
            _number(_mean(each["effective_rank"] for each in group), "{:.1f}"),
        ]
        for (kind, bank), group in groups.items()
    ]
    note = (
        "means over layers. Overlap: mean squared cosine of the principal angles between two experts' subspaces, 1 "
        "where they span the same; effective rank: of a whole bank's stacked experts"
    )
    return card(
        "likeness by bank", table(("linear", "bank", "|cos|", "overlap", "angle", "effective rank"), rows), note
    )


def _pictures(content: dict[str, Any]) -> str:
    cards, most = [], 0
    for picture in content["projection"]:
        points = [
            (each["x"], each["y"], each["expert"], f"layer {each['layer']}, expert {each['expert']}")
            for each in picture["points"]
        ]
        most = max(most, *(number + 1 for _, _, number, _ in points))
        axes = [f"{word}: {share:.0%}" for word, share in zip(("across", "up"), picture["explained"], strict=False)]
        title = f"{picture['kind']}, {BANKS[picture['bank']]}"
        cards.append(card(title, scatter(title, points, [*axes, "", ""][:2])))
    if not cards:
        return ""
    lead = (
        "Experts of all layers on the two main axes of each bank (PCA of unit vectors; axes tell their share of the "
        "variance). Experts that learned the same lie on one another."
    )
    names = key([(f"expert {number}", number, "") for number in range(min(most, 16))], as_boxes=True)
    return paragraph(lead) + names + grid(cards, "small")


def _number(value: float | None, form: str = "{:.3f}") -> str:
    return "" if value is None else form.format(value)


def _mean(values: Iterable[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


__all__ = ["BANKS", "ROLES", "experts_section", "routing_section"]
