"""Rows to one padded batch; padding is masked by position, never by token, so a real end token keeps its label."""

import torch
from torch import Tensor

from qd2mora.base.passes import IGNORE
from qd2mora.data.token_rows import Row


def collate(rows: list[Row], pad: int, multiple: int = 8, side: str = "right") -> dict[str, Tensor]:
    """Return input_ids, attention_mask, labels, (rows, longest row rounded up); task_index, group (rows,); int64.

    Where rows bring a vector, also `external` (rows, width) float32.
    """
    width = -(-max(len(row.ids) for row in rows) // multiple) * multiple
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORE)
    for number, row in enumerate(rows):
        tokens = torch.from_numpy(row.ids.astype("int64"))
        start = 0 if side == "right" else width - len(tokens)
        stop = start + len(tokens)
        ids[number, start:stop] = tokens
        mask[number, start:stop] = 1
        for first, last in (*row.earlier, (row.masked, len(tokens))):
            labels[number, start + first : start + last] = tokens[first:last]
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    batch["task_index"] = torch.tensor([row.task for row in rows])
    batch["group"] = torch.tensor([row.group for row in rows])
    vectors = [row.pair.vector for row in rows if row.pair.vector is not None]
    if len(vectors) == len(rows):
        batch["external"] = torch.tensor(vectors)
    return batch


__all__ = ["collate"]
