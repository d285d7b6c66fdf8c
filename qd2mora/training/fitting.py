"""The plan that a run trains by: one that fits, and after a kill the one that it began with."""

import logging
from collections.abc import Callable

import torch

from qd2mora.errors import WillNotFit
from qd2mora.memory.ledger import CUDA_CONTEXT, EMBEDDINGS, INPUTS, STREAMED
from qd2mora.memory.place import Limit, Place
from qd2mora.memory.plan import Plan, plan
from qd2mora.recipe import Recipe
from qd2mora.recipe.section import Section
from qd2mora.training.identity import Manifest
from qd2mora.training.processes import Processes

ON_HOST = {
    STREAMED: "memory.offload.weights",
    EMBEDDINGS: "memory.offload.embeddings",
    INPUTS: "memory.offload.activations",
}
"""What puts it there."""

_log = logging.getLogger(__name__)


def fitting_plan(recipe: Recipe, processes: Processes, begun: Manifest | None = None) -> Plan:
    """Plan a run, the same on every process; `begun` is the manifest of the run that a resume continues.

    What is free may be another number than at the start, and another micro batch would give other bytes: what sums
    depend on stays as it was wherever it still fits, and where not, that is logged. Several processes plan for the
    fullest of their devices: with a micro batch each, rows would be dealt out twice or never.

    Raises WillNotFit; InputRefused where the processes' plans differ all the same.
    """
    agreed = None
    if processes.count > 1:
        here = Limit.of_free(Place.of(processes.device, has_budget=False))
        assert here.size is not None
        agreed = processes.least(here.size)
    planned = _fitting(recipe, processes.device, begun, agreed)
    processes.refuse_other({"plan": str(planned.layout)})
    hold_to(planned, processes.device)
    return planned


def hold_to(planned: Plan, device: torch.device) -> None:
    """Have the card's allocator give no more than was planned for.

    What is above fails at once and is tried again in smaller micro batches. Without, it would take from the programs
    beside it, or on Windows, whose drivers then go on in host memory, be ten times as slow and say nothing.
    """
    if device.type != "cuda" or planned.budget_bytes is None:
        return
    whole = torch.cuda.get_device_properties(device).total_memory
    # The context is no part of what torch's allocator counts.
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0, planned.budget_bytes - CUDA_CONTEXT) / whole), device)


def _fitting(recipe: Recipe, device: torch.device, begun: Manifest | None, agreed: int | None) -> Plan:
    # Of `auto` keys the first start has decided; what is free today must not decide again.
    if begun is not None:
        planned = plan(_as_begun(recipe, begun), device=device, agreed=agreed)
        if planned.fits:
            return planned
        _log.warning("memory: the plan that the run began with does not fit any more; it goes on with another one")
    planned = plan(recipe, device=device, agreed=agreed)
    if planned.host_shortfall_bytes:
        _refuse_host(planned)
    if not planned.fits:
        assert planned.budget_bytes is not None
        needed, there, ways = planned.peak_bytes / 2**30, planned.budget_bytes / 2**30, "; ".join(planned.ways_out)
        room = f"{there:.2f} GiB ({planned.budget_source}) less {planned.reserve_bytes / 2**30:.2f} GiB in reserve"
        raise WillNotFit(f"memory: needs {needed:.2f} GiB of {room}; ways out: {ways}")
    return planned


def _refuse_host(planned: Plan) -> None:
    largest = max(ON_HOST, key=lambda name: planned.host.get(name, 0))
    assert planned.host_free_bytes is not None
    needed, there = planned.host_bytes / 2**30, planned.host_free_bytes / 2**30
    raise WillNotFit(
        f"memory: needs {needed:.2f} GiB of host memory, {there:.2f} GiB are free, most of it for {largest}; ways out: "
        f"{ON_HOST[largest]}=none with a larger memory.budget, or a machine with more memory"
    )


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


__all__ = ["fitting_plan", "hold_to"]
