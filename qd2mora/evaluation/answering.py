"""What a model does with rows: writes answers, weighs choices, is surprised by the right answer.

Rows of a batch never see each other: prompts are padded on the left with their positions counted from their own first
token, so that a row's result is the same alone and in any batch, up to the order of floating point sums.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from qd2mora.base.passes import device_of, labelled, labels_of, last_states, output_head, read_on, token_losses
from qd2mora.data import Row, collate
from qd2mora.evaluation.subject import Subject

# transformers 5.24 calls `past_key_values` `cache`; 5.17 knows only the old name.
warnings.filterwarnings("ignore", r".*past_key_values", FutureWarning)


@dataclass(frozen=True)
class Weighed:
    """A choice's negative log-likelihood after the prompt, in nats, and its tokens."""

    loss: float
    tokens: int


def write_answers(subject: Subject, rows: list[Row], max_new_tokens: int, beams: int = 1) -> list[str]:
    """Return what the model writes after each row's prompt."""
    prompts = [row.asked for row in rows]
    batch = batch_of(subject, prompts, "left")
    subject.route(batch, copies=beams)
    tokens = subject.continue_texts(batch["input_ids"], batch["attention_mask"], max_new_tokens, beams)
    return subject.texts_of(tokens)


@torch.no_grad()
def answer_losses(subject: Subject, rows: list[Row]) -> list[float]:
    """Return the summed cross-entropy of each row's own answer, in nats."""
    batch = batch_of(subject, rows, "right")
    subject.route(batch)
    keep = labelled(batch)
    states = last_states(subject.plain, batch)[:, :-1][keep]
    losses = token_losses(states, labels_of(batch), output_head(subject.plain))
    return _sums(losses, keep)


def weigh_choices(subject: Subject, rows: list[Row], choices: list[list[list[int]]]) -> list[list[Weighed]]:
    """Weigh each row's `choices` (token ids), equally many for every row of the batch."""
    if not subject.may_fork:
        return weigh_apart(partial(answer_losses, subject), rows, choices)
    return _weighed(_forked(subject, rows, choices), choices)


def _weighed(losses: list[list[float]], choices: list[list[list[int]]]) -> list[list[Weighed]]:
    return [
        [Weighed(loss, len(ids)) for loss, ids in zip(each, offered, strict=True)]
        for each, offered in zip(losses, choices, strict=True)
    ]


@torch.no_grad()
def _forked(subject: Subject, rows: list[Row], choices: list[list[list[int]]]) -> list[list[float]]:
    """Read each prompt once, and continue its cache with every choice."""
    copies = len(choices[0])
    prompts = [row.asked for row in rows]
    # On the left, so that every row's next token stands in the same column of the cache.
    batch = batch_of(subject, prompts, "left")
    mask = batch["attention_mask"]
    subject.route(batch)
    first = read_on(subject.plain, batch | {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)})
    # Each choice goes on from a copy of its own: it writes into the cache.
    first.cache.batch_repeat_interleave(copies)
    ids, keep = _padded([each for offered in choices for each in offered], subject)
    subject.route(batch, copies)
    starts = mask.sum(-1).repeat_interleave(copies)
    continued = {
        "input_ids": ids,
        "attention_mask": torch.cat([mask.repeat_interleave(copies, 0), keep.long()], 1),
        "position_ids": starts[:, None] + torch.arange(ids.shape[1], device=ids.device),
    }
    second = read_on(subject.plain, continued, first)
    # A choice's first token is predicted by the prompt's last state, its others by the states before them.
    before = first.states[:, -1:].repeat_interleave(copies, 0)
    states = torch.cat([before, second.states[:, :-1]], 1)
    losses = _sums(token_losses(states[keep], ids[keep], output_head(subject.plain)), keep)
    return [losses[start : start + copies] for start in range(0, len(losses), copies)]


def weigh_apart(
    losses_of: Callable[[list[Row]], list[float]], rows: list[Row], choices: list[list[list[int]]]
) -> list[list[Weighed]]:
    """Read prompt and choice whole for every choice, where what is kept of a prompt cannot be copied."""
    columns = []
    for number in range(len(choices[0])):
        whole = []
        for row, offered in zip(rows, choices, strict=True):
            whole.append(row.with_answer(np.asarray(offered[number], dtype=np.int32)))
        columns.append(losses_of(whole))
    return _weighed([list(each) for each in zip(*columns, strict=True)], choices)


def _padded(texts: list[list[int]], subject: Subject) -> tuple[Tensor, Tensor]:
    """Return (texts, longest) token ids, padded on the right, and which of them count."""
    width = max(map(len, texts))
    pad = subject.tokenizer.pad_token_id
    ids = torch.tensor([each + [pad] * (width - len(each)) for each in texts])
    keep = torch.tensor([[True] * len(each) + [False] * (width - len(each)) for each in texts])
    return ids.to(device_of(subject.plain)), keep.to(device_of(subject.plain))


def _sums(losses: Tensor, keep: Tensor) -> list[float]:
    """Sum the losses of the kept places of each row, in float64."""
    row_of_token = keep.nonzero()[:, 0]
    sums: Tensor = torch.zeros(len(keep), dtype=torch.float64, device=losses.device)
    return sums.index_add(0, row_of_token, losses.double()).tolist()


def batch_of(subject: Subject, rows: list[Row], side: str) -> dict[str, Tensor]:
    """Collate rows on the device of the model, padded on `side`."""
    batch = collate(rows, subject.tokenizer.pad_token_id, multiple=1, side=side)
    subject.check_ids(batch["input_ids"])
    return {name: tensor.to(device_of(subject.plain)) for name, tensor in batch.items()}


__all__ = ["Weighed", "answer_losses", "batch_of", "weigh_apart", "weigh_choices", "write_answers"]
