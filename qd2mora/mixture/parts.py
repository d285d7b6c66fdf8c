"""The tensors of an adapter, and which part of it each is: down or up experts, what lies between them, or a router."""

from typing import Literal

from qd2mora.routed.gate import ROLES

TENSORS = (
    "mixture_A",
    "mixture_B",
    "mixture_core",
    "mixture_shared_A",
    "mixture_shared_B",
    "mixture_start_A",
    "mixture_start_B",
    "mixture_base_scale",
    "mixture_magnitude",
    "mixture_task_embedding",
    "mixture_router_task",
    *(f"mixture_{what}_{role}" for role in ROLES for what in ("router", "bias", "out", "logits", "select_bias")),
)
"""All that an adapter may have at a linear."""

Part = Literal["down", "up", "core", "router"]

_BANKS: dict[str, Part] = {
    "mixture_A": "down",
    "mixture_shared_A": "down",
    "lora_A": "down",
    "mixture_B": "up",
    "mixture_shared_B": "up",
    "lora_B": "up",
    "mixture_core": "core",
}
# Selection biases are no part: nothing trains them, `after_step` moves them.
_ROUTERS: dict[str, Part] = dict.fromkeys(
    (
        "mixture_task_embedding",
        "mixture_router_task",
        *(f"mixture_{what}_{role}" for role in ROLES for what in ("router", "bias", "out", "logits")),
    ),
    "router",
)
PARTS: dict[str, Part] = _BANKS | _ROUTERS


def part_of(parameter: str) -> Part | None:
    """Return the part that a parameter of an adapted model is, by a word of its dotted name; None: no such part.

    The scale of a base and the magnitudes of DoRA are parts of their own.
    """
    return next((PARTS[word] for word in parameter.split(".") if word in PARTS), None)


__all__ = ["PARTS", "TENSORS", "Part", "part_of"]
