"""Rows to one padded batch; padding is masked by position, never by token, so a real end token keeps its label."""

import torch
from torch import Tensor

from qd2mora.base.passes import IGNORE
from qd2mora.data.token_rows import Row


def collate(rows: list[Row], pad: int, multiple: int = 8, side: str = "right") -> dict[str, Tensor]:
    """Return input_ids, attention_mask, labels, (rows, longest row rounded up); task_index, group (rows,); int64.

    Where rows bring a vector, also `external` (rows, width) float32. Where the data marks spans, also `marks`, the mark
    of each token, and `answer_mark` (rows,), int64.
    """
    width = -(-max(len(row.ids) for row in rows) // multiple) * multiple
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros_like(ids)
    labels, marks = torch.full_like(ids, IGNORE), torch.zeros_like(ids)
    for number, row in enumerate(rows):
        tokens = torch.from_numpy(row.ids.astype("int64"))
        start = 0 if side == "right" else width - len(tokens)
        stop = start + len(tokens)
        ids[number, start:stop] = tokens
        mask[number, start:stop] = 1
        for first, last in (*row.earlier, (row.masked, len(tokens))):
            labels[number, start + first : start + last] = tokens[first:last]
        for mark, first, last in row.marks or ():
            marks[number, start + first : start + min(last, len(tokens))] = mark
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    batch["task_index"] = torch.tensor([row.task for row in rows])
    batch["group"] = torch.tensor([row.group for row in rows])
    vectors = [row.pair.vector for row in rows if row.pair.vector is not None]
    if len(vectors) == len(rows):
        batch["external"] = torch.tensor(vectors)
    if any(row.marks is not None for row in rows):
        batch["marks"], batch["answer_mark"] = marks, torch.tensor([row.answer_mark for row in rows])
    return batch


__all__ = ["collate"]
