"""What routers and experts of an adapter do: who is used by which task, how alike experts are, what collapsed."""

from qd2mora.inspection.alarm import collapse_line
from qd2mora.inspection.content import NO_ROUTERS, read_routing, routing_content, summary
from qd2mora.inspection.counting import RoutingWatch
from qd2mora.inspection.run import inspect_run

__all__ = [
    "NO_ROUTERS",
    "RoutingWatch",
    "collapse_line",
    "inspect_run",
    "read_routing",
    "routing_content",
    "summary",
]
