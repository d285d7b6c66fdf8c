"""The plan that a run trains by: one that fits, and after a kill the one that it began with."""

import logging
from collections.abc import Callable

import torch

from qd2mora.errors import WillNotFit
from qd2mora.memory.plan import Plan, plan
from qd2mora.recipe import Recipe
from qd2mora.recipe.section import Section
from qd2mora.training.identity import Manifest

_log = logging.getLogger(__name__)


def fitting_plan(recipe: Recipe, device: torch.device, begun: Manifest | None = None) -> Plan:
    """Plan a run; `begun` is the manifest of the run that a resume continues. Raises WillNotFit.

    What is free may be another number than at the start, and another micro batch would give other bytes: what sums
    depend on stays as it was wherever it still fits, and where not, that is logged.
    """
    # Of `auto` keys the first start has decided; what is free today must not decide again.
    if begun is not None:
        planned = plan(_as_begun(recipe, begun), device=device)
        if planned.fits:
            return planned
        _log.warning("memory: the plan that the run began with does not fit any more; it goes on with another one")
    planned = plan(recipe, device=device)
    if not planned.fits:
        assert planned.budget_bytes is not None
        needed, there, ways = planned.peak_bytes / 2**30, planned.budget_bytes / 2**30, "; ".join(planned.ways_out)
        room = f"{there:.2f} GiB ({planned.budget_source}) less {planned.reserve_bytes / 2**30:.2f} GiB in reserve"
        raise WillNotFit(f"memory: needs {needed:.2f} GiB of {room}; ways out: {ways}")
    return planned


def _as_begun(recipe: Recipe, begun: Manifest) -> Recipe:
    """Return the recipe with what it leaves open, and sums depend on, as a run's manifest says."""
    chosen = begun["plan"].get("choices")

    def value(key: str) -> object:
        choice = chosen.get(key) if isinstance(chosen, dict) else None
        return choice.get("value") if isinstance(choice, dict) else None

    return recipe.model_copy(
        update={
            "train": _filled(recipe.train, "train", ("micro_batch", "optimizer"), value),
            "memory": _filled(recipe.memory, "memory", ("loss_chunk",), value),
        }
    )


def _filled(section: Section, name: str, keys: tuple[str, ...], value: Callable[[str], object]) -> Section:
    open_keys = (key for key in keys if getattr(section, key) == "auto" and value(f"{name}.{key}") is not None)
    return section.model_copy(update={key: value(f"{name}.{key}") for key in open_keys})


__all__ = ["fitting_plan"]
