"""What routers need beside the hidden states, and what they leave behind: one object for all adapted linears.

The tuner's hooks fill it before a forward pass; it stays as it is for the backward pass of recomputed layers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qd2mora.mixture.draws import Draws, mixed

if TYPE_CHECKING:
    from qd2mora.mixture.block import Slots

IGNORE = -100


@dataclass
class Routing:
    """The rows of the pass that runs.

    task_index, group: (B,) int64. external: (B, W). attended, prompt: (B, T) bool; None counts every token, and knows
    no prompt. rows, lengths: a key for each row's random numbers, and its length without padding. segments, places:
    where rows are packed, (B, T) int64 the number of each token's row, -1 for padding, and the line and the place where
    each row begins. hidden: (B, T, H), the states of a first pass. share: this micro batch's share of the step's tokens
    and rows, which a routing penalty counts by; loss_scale: what the loss is multiplied with before the backward pass.
    advantage: (B,), how much worse than its rivals a sampled routing did, loss scale included. stage: the expert
    trained now, where a method grows. is_counted: False where the rows run for the company of other processes alone.
    """

    task_index: Tensor | None = None
    group: Tensor | None = None
    external: Tensor | None = None
    attended: Tensor | None = None
    prompt: Tensor | None = None
    rows: tuple[int, ...] | None = None
    lengths: tuple[int, ...] | None = None
    segments: Tensor | None = None
    places: tuple[tuple[int, int], ...] | None = None
    hidden: Tensor | None = None
    share: tuple[float, float] = (1.0, 1.0)
    is_counted: bool = True
    loss_scale: float = 1.0
    stage: int | None = None
    advantage: Tensor | None = None
    is_decoding: bool = False
    keeps_pools: bool = False
    is_first_pass: bool = False
    shared_logits: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    slots: dict[tuple[str, str], "Slots"] = field(default_factory=dict)
    pools: dict[tuple[str, str], tuple[Tensor, Tensor]] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    _known: tuple[Tensor, int] | None = None

    def read(self, batch: Mapping[str, Tensor]) -> None:
        """Take what a collated batch says of its rows; labels tell the prompt."""
        self.task_index = batch.get("task_index")
        self.group = batch.get("group")
        self.external = batch.get("external")
        self.segments = batch.get("segments")
        labels = batch.get("labels")
        self.prompt = None if labels is None else prompt_of(labels, batch.get("attention_mask"))

    def tasks_among(self, num_tasks: int) -> Tensor:
        """Return task_index, looked at once a pass: a look waits for the device. Raises ValueError."""
        index = self.task_index
        if index is None:
            raise ValueError("this adapter routes by task: pass task_index=(batch,) to the model's forward")
        is_known = self._known is not None and self._known[0] is index and self._known[1] == num_tasks
        # A compiler cannot look; a number outside then fails in torch's own indexing.
        if not is_known and not torch.compiler.is_compiling():
            if int(index.max()) >= num_tasks or int(index.min()) < 0:
                raise ValueError(f"task_index {index.tolist()} is outside the {num_tasks} tasks of this adapter")
            self._known = (index, num_tasks)
        return index

    def reorder_pools(self, order: Tensor) -> None:
        """Follow beam search, which goes on with other rows than before: `order` (rows,)."""
        for key, (summed, number) in self.pools.items():
            moved = [part.index_select(0, order.to(part.device)) if part.dim() else part for part in (summed, number)]
            self.pools[key] = (moved[0], moved[1])

    def draws(self, layer_key: int, device_seed: int | None = None) -> Draws:
        """Return the keys of one layer's random numbers in this pass; without row keys, one from torch's generator."""
        if self.rows is not None and self.lengths is not None:
            return Draws(tuple(mixed(row, layer_key) for row in self.rows), self.lengths, self.places)
        seed = int(torch.randint(1 << 62, ())) if device_seed is None else device_seed
        return Draws((seed,))

    def counted(self, like: Tensor) -> Tensor:
        """Return (B, T) of ones at the tokens that count, for `like` (B, T, ...)."""
        if not self.is_counted:
            return torch.zeros(like.shape[:2], device=like.device)
        if self.attended is None or self.attended.shape != like.shape[:2]:
            return torch.ones(like.shape[:2], device=like.device)
        return self.attended.to(like.device)

    def add_value(self, name: str, value: Tensor) -> None:
        """Add what a penalty adds to the loss in this micro batch to the step's sum."""
        self.values[name] = self.values[name] + value if name in self.values else value

    def take_values(self) -> dict[str, float]:
        """Return the sums since the last call, and start anew."""
        taken = {name: float(value) for name, value in self.values.items()}
        self.values.clear()
        return taken

    def forget(self) -> None:
        """Drop what an abandoned try of a step left behind."""
        self.values.clear()
        self.counts.clear()

    def add_counts(self, key: tuple[str, str], used: Tensor) -> None:
        """Add how often each expert was used."""
        self.counts[key] = self.counts[key] + used if key in self.counts else used


def prompt_of(labels: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return (B, T) bool: the tokens before the first label. The first token is never learned, so it always counts."""
    attended = torch.ones_like(labels, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    before = (labels != IGNORE).cumsum(-1) == 0
    first = attended & (attended.cumsum(-1) == 1)
    return (before & attended) | first


__all__ = ["IGNORE", "Routing", "prompt_of"]
