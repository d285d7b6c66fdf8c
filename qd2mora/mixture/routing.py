"""What routers need beside the hidden states in training, and what they leave behind: one object for all linears.

The tuner fills it before a forward pass; it stays as it is for the backward pass of recomputed layers.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qd2mora.mixture.balance import Pooled
from qd2mora.mixture.draws import Draws, Rows
from qd2mora.mixture.phases import PLAIN, Phase
from qd2mora.mixture.slots import Slots
from qd2mora.routed.text import Key, Text


@dataclass
class Routing(Text):
    """The rows of the pass that runs: their text, and what a run says of them.

    task_index, group: (B,) int64. marks: (B, T) int64, the number of the span's adapter, from 1, at each token; 0
    in no span. answer_mark: (B,) int64, that of tokens of an answer that is written after it. external: (B, W).
    rows, lengths: a key for each row's random numbers, and its length without padding. places: where rows are
    packed, the line and the place where each begins. share: this micro batch's share of the step's tokens and rows,
    which a routing penalty counts by; loss_scale: what the loss is multiplied with before the backward pass.
    advantage: (B,), how much worse than its rivals a sampled routing did, loss scale included. better: (B,) int64,
    1 where an expert does better on a row than the base. phase: what gates are like while they are learned.
    is_counted: False where the rows run for the company of other processes alone. slots: of MLPs whose experts are
    mixed, until their last linear ran. pooled: a router's layer, and means of what it decided in this pass. values:
    what penalties added to the loss since they were taken. counts: how often each expert was used in this step.
    """

    task_index: Tensor | None = None
    group: Tensor | None = None
    marks: Tensor | None = None
    answer_mark: Tensor | None = None
    external: Tensor | None = None
    rows: tuple[int, ...] | None = None
    lengths: tuple[int, ...] | None = None
    places: tuple[tuple[int, int], ...] | None = None
    share: tuple[float, float] = (1.0, 1.0)
    is_counted: bool = True
    loss_scale: float = 1.0
    phase: Phase = PLAIN
    advantage: Tensor | None = None
    better: Tensor | None = None
    slots: dict[Key, Slots] = field(default_factory=dict)
    pooled: dict[Key, tuple[int, Pooled]] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[Key, Tensor] = field(default_factory=dict)
    _known: tuple[Tensor, int] | None = None
    _known_marks: tuple[Tensor, int] | None = None
    _drawn: Rows | None = None

    def read(self, batch: Mapping[str, Tensor]) -> None:
        """Take what a collated batch says of its rows; labels tell the prompt."""
        self.task_index = batch.get("task_index")
        self.group = batch.get("group")
        self.marks, self.answer_mark = batch.get("marks"), batch.get("answer_mark")
        self.external = batch.get("external")
        self.segments = batch.get("segments")
        self.real = batch.get("attended")
        if self.segments is not None:
            self.real = self.segments >= 0  # padding is in no row
        # Told, not seen: a decoder's arguments hold no labels, and the prompt is what stands before the first of them.
        self.read_labels(batch.get("labels"), batch.get("attention_mask", batch.get("attended")))

    def told(self) -> dict[str, object]:
        """Return what has been said of the rows that are read next, with nothing left behind of them: for `within`."""
        # `values` and `counts` add up over a step and stay the same for all its passes.
        return {**vars(self), "scores": {}, "means": {}, "slots": {}, "pooled": {}}

    @contextmanager
    def within(self, told: dict[str, object]) -> Iterator[None]:
        """Be in one of several passes while the block runs, where they take turns; keep what it leaves for its own."""
        vars(self).update(told)
        yield
        told.update(vars(self))

    def pool_of(self, adapter: str, layer: int | None, num_experts: int, by_row: bool) -> Pooled:
        """Return the means of an adapter's routers among so many experts, of a layer or of all, as a pass left them."""
        own = [each for (name, _), each in self.pooled.items() if name == adapter and layer in (None, each[0])]
        return Pooled.joined([means for _, means in own if means.used.shape[-1] == num_experts], by_row)

    def tasks_among(self, num_tasks: int) -> Tensor:
        """Return task_index, looked at once a pass: a look waits for the device. Raises ValueError."""
        # Every layer asks; the device is waited for once, at the first.
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

    def marks_among(self, num_experts: int) -> Tensor:
        """Return marks, looked at once a pass for each number of experts. Raises ValueError."""
        marks = self.marks
        if marks is None:
            raise ValueError(
                "this adapter acts in spans of the text: pass marks=(batch, length) to the model's forward"
            )
        known = self._known_marks
        is_known = known is not None and known[0] is marks and known[1] <= num_experts
        if not is_known and not torch.compiler.is_compiling():
            most = int(marks.max()) if self.answer_mark is None else max(int(marks.max()), int(self.answer_mark.max()))
            if most > num_experts or int(marks.min()) < 0:
                raise ValueError(f"marks up to {most} for the {num_experts} adapters that spans of this one may have")
            self._known_marks = (marks, num_experts)
        return marks

    def draws(self, layer_key: int) -> Draws:
        """Return the keys of one layer's random numbers in this pass; without row keys, one from torch's generator."""
        if self.rows is not None and self.lengths is not None:
            # One object for all layers of a pass: on a GPU its table crosses over once.
            rows = Rows(self.rows, self.lengths, self.places)
            if self._drawn != rows:
                self._drawn = rows
            return Draws(self._drawn, layer_key)
        # Other people's trainers tell no rows: one seed then serves the layer, and the split into micro batches shows.
        return Draws(Rows((int(torch.randint(1 << 62, ())),)))

    def counted(self, like: Tensor) -> Tensor:
        """Return (B, T) of ones at the tokens that count, for `like` (B, T, ...); zeros for rows that no one counts."""
        return super().counted(like) if self.is_counted else torch.zeros(like.shape[:2], device=like.device)

    def add_value(self, name: str, value: Tensor) -> None:
        """Add what a penalty adds to the loss in this micro batch to the step's sum."""
        # Kept as a tensor: a Python number would make every linear wait for the device.
        if name in self.values:
            value = self.values[name] + value
        self.values[name] = value

    def take_values(self) -> dict[str, float]:
        """Return the sums since the last call, and start anew."""
        taken = {name: float(value) for name, value in self.values.items()}
        self.values.clear()
        return taken

    def forget(self) -> None:
        """Drop what an abandoned try of a step left behind."""
        self.values.clear()
        self.counts.clear()

    def add_counts(self, key: Key, used: Tensor) -> None:
        """Add how often each expert was used."""
        if key in self.counts:
            used = self.counts[key] + used
        self.counts[key] = used


__all__ = ["Routing"]
