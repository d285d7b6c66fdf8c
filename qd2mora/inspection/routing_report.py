"""What `routing.json` holds: every router and every bank of experts, their means, and a picture of the experts."""

import json
from dataclasses import asdict, dataclass

from pydantic import TypeAdapter

from qd2mora.disk.durable import write_json
from qd2mora.errors import DamagedFile
from qd2mora.inspection.experts import BankMeasures
from qd2mora.inspection.measures import RouterMeasures
from qd2mora.run_folder import RunFolder
from qd2mora.safekeeping.inventory import noted

VERSION = 1

Summary = dict[str, int | float | None]
"""Means over routers, and counts, by name."""


@dataclass(frozen=True)
class RouterReport:
    """A router, what it did, and whether it has collapsed; `at_once`: experts a token uses at least, None for all."""

    module: str
    layer: int
    kind: str
    role: str
    experts: int
    at_once: int | None
    collapsed: bool
    measures: RouterMeasures

    @property
    def evenness(self) -> float:
        """Share of its experts that are in use, 1 where all are alike."""
        return self.measures.effective_experts / self.experts


@dataclass(frozen=True)
class BankReport:
    """A bank of experts, down or up, and how alike they are."""

    module: str
    layer: int
    kind: str
    bank: str
    experts: int
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
        """Return the content of `routing.json`, where measures stand beside the names of what they are of."""
        content = {"version": VERSION} | asdict(self)
        for part in ("routers", "banks"):
            for each in content[part]:
                each.update(each.pop("measures"))
        return content


def write_routing(folder: RunFolder, report: RoutingReport) -> None:
    with noted(folder.routing):
        write_json(folder.routing, report.to_json())


def read_routing(folder: RunFolder) -> RoutingReport | None:
    """Return the content of `routing.json`, None where there is none. Raises DamagedFile."""
    if not folder.routing.is_file():
        return None
    try:
        content = json.loads(folder.routing.read_text(encoding="utf-8"))
        if content["version"] == VERSION:
            for part in ("routers", "banks"):
                # A type takes the fields that are its own and leaves the others.
                content[part] = [each | {"measures": each} for each in content[part]]
            return TypeAdapter(RoutingReport).validate_python(content)
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFile(
            f"{folder.routing} is not a routing report; `qd2mora inspect --again` writes it anew"
        ) from error
    raise DamagedFile(f"{folder.routing} is of another version; `qd2mora inspect --again` writes it anew")


__all__ = [
    "BankReport",
    "ExpertPoint",
    "Projection",
    "RouterReport",
    "RoutingReport",
    "Summary",
    "read_routing",
    "write_routing",
]
