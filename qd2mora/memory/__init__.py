"""Memory: what a run will take, planned before it starts, and the loss that takes little of it."""

from qd2mora.memory.plan import Plan, parse_size, plan, render

__all__ = ["Plan", "parse_size", "plan", "render"]
