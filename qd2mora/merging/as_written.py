"""What a file of few bits keeps, measured on the file itself: read back, dequantised, and asked as the run was.

The routed model speaks first, before it makes room: its states that predict held-out tokens are kept in host memory,
(tokens, hidden) of at most 512 rows. Then the file is loaded as any base is. The base's own loss is the one that was
measured before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qd2mora.base import load_base
from qd2mora.base.passes import OutputHead, label_states, labels_of, output_head
from qd2mora.memory.loss import labelled_states
from qd2mora.merging.fidelity import Fidelity, compare, task_of_token
from qd2mora.merging.sample import PaddedBatches
from qd2mora.recipe import Base
from qd2mora.run_folder import OpenRun
from qd2mora.terminal.pace import paced


@dataclass(frozen=True)
class Witness:
    """What the routed model says of held-out rows; `before`: what the export keeps until its file is quantised."""

    batches: PaddedBatches
    states: Sequence[Tensor]
    head: OutputHead
    before: Fidelity
    tasks: Sequence[str]
    """Names of all the run's tasks, by number."""

    def compared_with(self, file: Path) -> Fidelity:
        """Measure a GGUF file on the same rows. Raises InputRefused, DamagedFile."""
        model = load_base(Base(model=str(file), quantization="none"), self.batches.device)
        return self.compared_with_model(model, file.name)

    @torch.no_grad()
    def compared_with_model(self, model: PreTrainedModel, name: str) -> Fidelity:
        """Measure a model on the same rows; `name` is for whoever waits."""
        head = output_head(model)
        # Losses of routed and file, KL, agreement, tokens: a row a task.
        sums = torch.zeros(len(self.tasks), 5, dtype=torch.float64)
        for number, batch in enumerate(paced(f"measuring {name}, batches", self.batches)):
            found = label_states(model, batch)
            routed = self.states[number].to(found.device)
            compared = compare((routed, found), (self.head, head), labels_of(batch))
            sums.index_add_(0, task_of_token(batch, len(self.tasks)), compared)
        of_tasks = dict(zip(self.tasks, sums, strict=True))
        parts = {task: _fidelity(each, of_tasks[task]) for task, each in self.before.tasks.items()}
        return _fidelity(self.before, sums.sum(0), parts)


def witness_of(opened: OpenRun, held_out: PaddedBatches, before: Fidelity) -> Witness:
    """Ask the routed model what a file will be compared with."""
    names = [each.name for each in opened.recipe.data.tasks]
    with torch.no_grad():
        states = [labelled_states(opened.model, batch).cpu() for batch in paced("asking the routed model", held_out)]
    return Witness(held_out, states, output_head(opened.model), before, names)


def _fidelity(before: Fidelity, sums: Tensor, tasks: dict[str, Fidelity] | None = None) -> Fidelity:
    routed, merged, kl, agreed, _ = (sums / sums[4].clamp_min(1)).tolist()
    return Fidelity(before.base, routed, merged, kl, int(sums[4]), agreed, tasks or {})


__all__ = ["Witness", "witness_of"]
