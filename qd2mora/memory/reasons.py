"""Why the plan is what it is, a line for each thing chosen."""

from dataclasses import dataclass, replace
from typing import Any

from qd2mora.base.passes import CHUNK
from qd2mora.memory.choosing import GIB, KEPT_WITHOUT_BUDGET, LARGEST_MICRO_BATCH, Search, reads_weights_at_start
from qd2mora.memory.ledger import Setting


@dataclass(frozen=True)
class Choice:
    """A value and why."""

    value: Any
    reason: str


@dataclass(frozen=True)
class _Technique:
    """Something that saves memory: asked how, set how, why where it is used and where it is not."""

    asked: Any
    value: Any
    is_used: bool
    why: str
    why_not: str
    without: Setting


def reasons(search: Search, chosen: Setting, limit: int | None, source: str, is_within: bool) -> dict[str, Choice]:
    """Return value and reason by the recipe's key; of a technique that is used, what the plan would need without it."""
    recipe, memory = search.recipe, search.recipe.memory
    room = f"{(KEPT_WITHOUT_BUDGET if limit is None else limit) / GIB:.2f} GiB ({source})"

    def choice(asked: Any, value: Any, reason: str) -> Choice:
        if asked != "auto":
            return Choice(value, "as the recipe says")
        return Choice(value, reason if is_within else f"smallest plan; nothing fits {room}")

    largest = f"the largest divisor of global_batch up to {LARGEST_MICRO_BATCH}; {source}"
    choices = {
        "train.micro_batch": choice(
            recipe.train.micro_batch, chosen.micro_batch, largest if limit is None else f"fastest plan that fits {room}"
        ),
        "memory.checkpointing": choice(memory.checkpointing, *_recomputing(search, chosen, room)),
    }
    for key, technique in _techniques(search, chosen).items():
        why = technique.why if technique.is_used else technique.why_not
        if technique.is_used and limit is not None:
            why += f"; without it this plan needs {search.peak(technique.without) / GIB:.2f} GiB"
        choices[key] = choice(technique.asked, technique.value, why)
    dtype, where = str(chosen.dtype).removeprefix("torch."), "a GPU" if chosen.on_gpu else "a CPU"
    as_asked = f"planned for {where}" if recipe.base.compute_dtype == "auto" else f"as the recipe says, on {where}"
    choices["base.compute_dtype"] = Choice(dtype, as_asked)
    return choices


def _techniques(search: Search, chosen: Setting) -> dict[str, _Technique]:
    recipe, offload = search.recipe, search.recipe.memory.offload
    stays = "fits without" if chosen.on_gpu else "beside a CPU there is nowhere to go"
    return {
        "memory.loss_chunk": _Technique(
            recipe.memory.loss_chunk,
            chosen.loss_chunk,
            chosen.loss_chunk < CHUNK,
            "logits of fewer tokens at once, 1% of time",
            "logits of so many tokens at once fit, and more are no faster",
            replace(chosen, loss_chunk=CHUNK),
        ),
        "train.optimizer": _Technique(
            recipe.train.optimizer,
            chosen.optimizer,
            chosen.optimizer != "adamw",
            "moments of two bytes instead of eight",
            "32-bit moments fit",
            replace(chosen, optimizer="adamw"),
        ),
        "memory.offload.activations": _Technique(
            offload.activations,
            "cpu" if chosen.offload_activations else "none",
            chosen.offload_activations,
            "inputs of recomputed layers wait on the host, 2% of time",
            stays,
            replace(chosen, offload_activations=False),
        ),
        "memory.offload.embeddings": _Technique(
            offload.embeddings,
            "cpu" if chosen.offload_embeddings else "none",
            chosen.offload_embeddings,
            "rows are looked up on the host, 0.3% of time",
            stays if search.shapes.head_entries else "tied to the output head",
            replace(chosen, offload_embeddings=False),
        ),
        "memory.offload.weights": _Technique(
            offload.weights,
            "stream" if chosen.stream else "none",
            chosen.stream,
            "frozen layers wait on the host and visit the device two at a time",
            "the adapter is made of them" if reads_weights_at_start(recipe) else stays,
            replace(chosen, stream=False),
        ),
    }


def _recomputing(search: Search, chosen: Setting, room: str) -> tuple[Any, str]:
    """Return the value of memory.checkpointing and why."""
    number, num_layers = chosen.recomputed, search.shapes.num_layers
    if number == 0:
        return "off", f"the activations fit {room}, and recomputing costs a third"
    dropped = f"the activations of this micro batch do not fit {room}"
    return ("on", dropped) if number == num_layers else (number, f"{dropped} but for {num_layers - number} layers")


__all__ = ["Choice", "reasons"]
