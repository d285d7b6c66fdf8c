"""Memory: what a run will take, planned before it starts, and the loss that takes little of it."""

from qd2mora.memory.plan import Plan, parse_size, plan
from qd2mora.memory.reasons import Choice
from qd2mora.memory.table import render

__all__ = ["Choice", "Plan", "parse_size", "plan", "render"]
