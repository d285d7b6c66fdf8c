"""Why the plan is what it is, a line for each thing chosen."""

from dataclasses import dataclass, replace

from qd2mora.memory.choosing import GIB, KEPT_WITHOUT_BUDGET, LARGEST_MICRO_BATCH, Search
from qd2mora.memory.ledger import fetched_bytes
from qd2mora.memory.place import Limit
from qd2mora.memory.techniques import TECHNIQUES, Layout, Technique
from qd2mora.memory.writing import TEXTS_AT_ONCE, texts_at_first

TEXTS = "answers at once"
ACCUMULATION = "memory.accumulation"


@dataclass(frozen=True)
class Choice:
    """A value and why."""

    value: object
    reason: str


def _room(limit: Limit) -> str:
    """Return what there is, in words."""
    if limit.size is None:
        return f"{KEPT_WITHOUT_BUDGET / GIB:.2f} GiB ({limit.source})"
    return f"{limit.size / GIB:.2f} GiB ({limit.source}) less {limit.reserve / GIB:.2f} GiB in reserve"


def reasons(search: Search, chosen: Layout, limit: Limit, is_within: bool) -> dict[str, Choice]:
    """Return value and reason by the recipe's key; of a technique that is used, what the plan would need without it."""
    recipe = search.case.recipe

    def choice(asked: object, value: object, reason: str) -> Choice:
        if asked != "auto":
            return Choice(value, "as the recipe says")
        if not is_within:
            return Choice(value, f"smallest plan; nothing fits {_room(limit)}")
        return Choice(value, reason)

    largest = f"fastest plan that fits {_room(limit)}"
    if limit.size is None:
        largest = f"the largest divisor of global_batch up to {LARGEST_MICRO_BATCH}; {limit.source}"
    choices = {
        "train.micro_batch": choice(recipe.train.micro_batch, chosen.micro_batch, largest),
        "memory.checkpointing": choice(recipe.memory.checkpointing, *_recomputing(search, chosen, _room(limit))),
    }
    for row in TECHNIQUES:
        choices[row.key] = choice(row.asked(recipe), row.told(chosen), _reason(search, chosen, row, limit))
    if chosen.stream:
        by_layer = choices[ACCUMULATION]
        choices[ACCUMULATION] = Choice(by_layer.value, f"{by_layer.reason}; {_traffic(search, chosen)}")
    if recipe.objective.kind == "grpo":
        choices[TEXTS] = _texts_choice(search, chosen, limit)
    choices["base.compute_dtype"] = _dtype_choice(search, chosen)
    return choices


def _reason(search: Search, chosen: Layout, technique: Technique, limit: Limit) -> str:
    reason = technique.reason(search.case, chosen)
    if technique.is_used(chosen) and limit.size is not None:
        # The rest of the layout stays: what this one technique saves here, not what another plan would take.
        needs = search.peak(technique.applied(chosen, technique.plain))
        if needs > search.peak(chosen):  # turns in each layer save time, and take memory
            reason += f"; without it this plan needs {needs / GIB:.2f} GiB"
    return reason


def _traffic(search: Search, chosen: Layout) -> str:
    """Return what is fetched of the weights in a step, and where micro batches take turns, without that."""
    shapes, recipe = search.case.shapes, search.case.recipe
    words = f"{fetched_bytes(shapes, recipe, chosen) / GIB:.2f} GiB of weights are fetched in a step"
    if chosen.at_once > 1:
        words += f", {fetched_bytes(shapes, recipe, replace(chosen, rows_by_layer=0)) / GIB:.2f} one after the other"
    return words


def _recomputing(search: Search, chosen: Layout, room: str) -> tuple[object, str]:
    """Return the value of memory.checkpointing and why."""
    number, num_layers = chosen.recomputed, search.case.shapes.num_layers
    if number == 0:
        return "off", f"the activations fit {room}, and recomputing costs a third"
    dropped = f"the activations of this micro batch do not fit {room}"
    if number == num_layers:
        return "on", dropped
    return number, f"{dropped} but for {num_layers - number} layers"


def _texts_choice(search: Search, chosen: Layout, limit: Limit) -> Choice:
    first, fit = texts_at_first(search.case.recipe), search.texts(chosen, limit.usable)
    if fit == first:
        return Choice(first, f"all of a step or of a task's held-out rows, up to {TEXTS_AT_ONCE}")
    needs = f"{first} at once would need {search.writing_peak(chosen, first) / GIB:.2f} GiB"
    return Choice(fit, f"{needs}: the run begins with them, and halves their number where memory runs out")


def _dtype_choice(search: Search, chosen: Layout) -> Choice:
    where = "a CPU"
    if chosen.on_gpu:
        where = "a GPU"
    reason = f"as the recipe says, on {where}"
    if search.case.recipe.base.compute_dtype == "auto":
        reason = f"planned for {where}"
    return Choice(str(chosen.dtype).removeprefix("torch."), reason)


__all__ = ["ACCUMULATION", "Choice", "reasons"]
