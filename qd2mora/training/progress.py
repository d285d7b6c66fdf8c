"""What a run is at a step: how far it is, the trainable tensors, the optimiser's moments, and a few numbers.

`StateSource` is where a checkpoint's content comes from and goes to: the updater, plain or an engine's. One that shares
parameters or moments out over processes gathers the small trainable state on every process, so that an engine's own
(pickled) checkpoints are never needed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from qd2mora.disk.tensor_file import Inventory

Best = tuple[int, float, str]
"""Step, value and what the value is, of the best evaluation so far."""


@dataclass
class Progress:
    """How far a run is; `step` counts data positions, `applied` the updates among them."""

    step: int = 0
    applied: int = 0
    bad_steps: int = 0
    bad_in_a_row: int = 0
    micro_batch: int | None = None
    """Rows in a forward pass, where memory forced it below the plan."""
    rows_by_layer: int | None = None
    """Rows of micro batches that take turns in each layer, where memory forced it below the plan."""
    loss_scale: float | None = None
    """Factor on the loss where gradients are float16."""
    applied_at_scale: int = 0
    best: dict[str, Best] = field(default_factory=dict)
    """Of each task and of the whole (see `best`)."""
    stale: int = 0
    """Evaluations since the last that was the best overall."""
    opened: int = 0
    """Experts that were opened after the first, where losses that come to rest do that."""
    rest: dict[str, tuple[float, int]] = field(default_factory=dict)
    """Of each task the best loss, and for how many evaluations it has not fallen."""


@dataclass(frozen=True)
class State:
    """Everything that continues a run. Tensors are on the CPU."""

    adapter: dict[str, Tensor]
    moments: dict[str, Tensor]
    scalars: dict[str, object]
    progress: Progress = field(default_factory=Progress)


class StateSource(Protocol):
    """Gives and takes the trainable state; every method is called on every process."""

    def collect(self, *, copied: bool) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, object]]:
        """Return adapter, moments and scalars on the CPU, `copied` where training goes on meanwhile."""

    def restore(self, state: State) -> None:
        """Put a state back."""

    def expected(self) -> tuple[Inventory, Inventory]:
        """Return what adapter and moments should hold: name to dtype and shape."""


def best_of_json(content: Mapping[str, tuple[int, float, str]]) -> dict[str, Best]:
    """Return what JSON, which knows no tuples, gives back of a record of the best. Raises ValueError, TypeError."""
    return {name: (step, value, by) for name, (step, value, by) in content.items()}


def owner_of(moment: str) -> str:
    """Return the parameter that a moment belongs to."""
    return moment.partition("::")[0]


__all__ = ["Best", "Progress", "State", "StateSource", "best_of_json", "owner_of"]
