"""What routers and experts of an adapter do: who is used by which task, how alike experts are, what collapsed."""

from qd2mora.inspection.alarm import collapse_line, likeness_line
from qd2mora.inspection.counting import RoutingWatch
from qd2mora.inspection.finished_run import inspect_run, inspect_where_due
from qd2mora.inspection.routing_report import RoutingReport, read_routing, write_routing
from qd2mora.inspection.routing_summary import NO_ROUTERS, routing_report, summary

__all__ = [
    "NO_ROUTERS",
    "RoutingReport",
    "RoutingWatch",
    "collapse_line",
    "inspect_run",
    "inspect_where_due",
    "likeness_line",
    "read_routing",
    "routing_report",
    "summary",
    "write_routing",
]
