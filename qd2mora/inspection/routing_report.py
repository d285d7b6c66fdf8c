"""What `routing.json` holds: every router and every bank of experts, their means, and a picture of the experts."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from pydantic import TypeAdapter

from qd2mora.disk.durable import write_json
from qd2mora.errors import DamagedFile
from qd2mora.inspection.experts import BankMeasures
from qd2mora.inspection.measures import RouterMeasures
from qd2mora.run_folder import RunFolder

VERSION = 1

Summary = dict[str, int | float | None]
"""Means over routers, and counts, by name."""


@dataclass(frozen=True)
class RouterPlace:
    """Where a router stands, what it gates, and whether it has collapsed.

    at_once: the experts that a token uses at least, None where it uses all.
    """

    module: str
    layer: int
    kind: str
    role: str
    experts: int
    at_once: int | None
    collapsed: bool


@dataclass(frozen=True)
class RouterReport:
    """A router and what it did."""

    place: RouterPlace
    measures: RouterMeasures

    @property
    def evenness(self) -> float:
        """Share of its experts that are in use, 1 where all are alike."""
        return self.measures.effective_experts / self.place.experts


@dataclass(frozen=True)
class BankPlace:
    """Where a bank of experts stands; `bank` is down or up."""

    module: str
    layer: int
    kind: str
    bank: str
    experts: int


@dataclass(frozen=True)
class BankReport:
    """A bank and how alike its experts are."""

    place: BankPlace
    measures: BankMeasures


@dataclass(frozen=True)
class ExpertPoint:
    """An expert's place on the two main axes of its picture."""

    layer: int
    expert: int
    x: float
    y: float


@dataclass(frozen=True)
class Projection:
    """Experts of one kind of linear and one bank on two axes; `explained`: the share of the variance of each."""

    kind: str
    bank: str
    explained: list[float]
    points: list[ExpertPoint]


@dataclass(frozen=True)
class RoutingReport:
    """Who routed where. `rows`: task to how many rows of which source were looked at; `pairs`: of experts, by bank.

    note: why there are no routers; alarm: what is wrong; step: the one after which it was measured, None at the end.
    """

    step: int | None
    tasks: list[str]
    rows: dict[str, dict[str, int]]
    note: str | None
    alarm: str | None
    summary: Summary
    pairs: dict[str, int]
    routers: list[RouterReport]
    banks: list[BankReport]
    projection: list[Projection]

    def to_json(self) -> dict[str, object]:
        """Return the content of `routing.json`: a router's or a bank's place and measures are one object there."""
        content: dict[str, object] = {"version": VERSION} | asdict(self)
        content["routers"] = [asdict(each.place) | asdict(each.measures) for each in self.routers]
        content["banks"] = [asdict(each.place) | asdict(each.measures) for each in self.banks]
        return content


def write_routing(folder: RunFolder, report: RoutingReport) -> None:
    """Write `routing.json`."""
    write_json(folder.routing, report.to_json())


def read_routing(folder: RunFolder) -> RoutingReport | None:
    """Return the content of `routing.json`, None where there is none. Raises DamagedFile."""
    if not folder.routing.is_file():
        return None
    try:
        content = json.loads(folder.routing.read_text(encoding="utf-8"))
        if content["version"] == VERSION:
            return _parsed(content)
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFile(
            f"{folder.routing} is not a routing report; `qd2mora inspect --again` writes it anew"
        ) from error
    raise DamagedFile(f"{folder.routing} is of another version; `qd2mora inspect --again` writes it anew")


def _parsed(content: Mapping[str, list[object]]) -> RoutingReport:
    """Check every part of a report against its type. Raises ValueError."""
    router_place, router_measures = TypeAdapter(RouterPlace), TypeAdapter(RouterMeasures)
    bank_place, bank_measures = TypeAdapter(BankPlace), TypeAdapter(BankMeasures)
    routers = [
        RouterReport(router_place.validate_python(each), router_measures.validate_python(each))
        for each in content["routers"]
    ]
    banks = [
        BankReport(bank_place.validate_python(each), bank_measures.validate_python(each)) for each in content["banks"]
    ]
    return TypeAdapter(RoutingReport).validate_python({**content, "routers": routers, "banks": banks})


__all__ = [
    "BankPlace",
    "BankReport",
    "ExpertPoint",
    "Projection",
    "RouterPlace",
    "RouterReport",
    "RoutingReport",
    "Summary",
    "read_routing",
    "write_routing",
]
