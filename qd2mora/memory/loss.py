"""The loss of a training step, row by row, and the states it is taken of, at the price of the labelled tokens only."""

from collections.abc import Mapping
from typing import Any

from peft import PeftModel
from torch import Tensor, nn

from qd2mora.base.passes import CHUNK, label_places, label_states, labels_of, output_head, token_losses
from qd2mora.errors import InputRefused
from qd2mora.mixture import read_rows

ISOLATING = ("sdpa", "eager")
"""Attention of transformers that stays within the rows of a packed line, whatever their number (tested)."""


class RowLoss(nn.Module):
    """Wraps an adapted model; its forward gives the loss of each row."""

    def __init__(self, model: PeftModel, chunk: int = CHUNK) -> None:
        super().__init__()
        self.model, self.chunk = model, chunk

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the summed cross-entropy of each row's labelled tokens, (rows,) float32, in nats."""
        losses, row_of_token, num_rows = self.by_token(batch)
        return losses.new_zeros(num_rows).index_add(0, row_of_token, losses)

    def by_token(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, int]:
        """Return the cross-entropy of each labelled token, (labelled,) float32, its row, and the number of rows."""
        # Row by row, not one sum: sampled routing judges each row's draw by its own loss, and the step divides by the
        # labels of all its micro batches, which this one cannot know.
        states = labelled_states(self.model, batch)
        losses = token_losses(states, labels_of(batch), output_head(self.model), self.chunk)
        places, num_rows = label_places(batch), len(batch["task_index"])
        if "segments" in batch:  # packed: the number of each token's row stands there
            # A label's, which stands one place after the state that predicts it.
            row_of_token = batch["segments"].flatten().index_select(0, places + 1)
        else:
            num_rows = len(batch["labels"])
            row_of_token = places // batch["labels"].shape[1]
        return losses, row_of_token, num_rows


def labelled_states(model: PeftModel, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the final hidden states that predict a label, (labelled, hidden); the routers are told of the rows."""
    if "segments" in batch:
        check_isolation(model)
    # Before the pass: which tokens are the prompt, and whose task a row is, cannot be read off hidden states.
    read_rows(model, batch)
    # What a row's last token predicts is not in the row.
    return label_states(model, batch)


def check_isolation(model: PeftModel) -> None:
    """Refuse to pack rows under an attention that may look from one row into the next. Raises InputRefused.

    Flash attention is bounded where positions restart only in a batch of one line (transformers 5.24,
    `_is_packed_sequence`); with more it runs over whole lines.
    """
    base: Any = model.get_base_model()
    kind = base.config._attn_implementation
    if kind not in ISOLATING:
        raise InputRefused(
            f"data.packing: attention '{kind}' may look from one row of a line into the next; set packing: false, or "
            f"attn_implementation in the base's config.json to one of {', '.join(ISOLATING)}"
        )


__all__ = ["RowLoss", "check_isolation", "labelled_states"]
