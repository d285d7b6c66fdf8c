"""The loss, at the price of the labelled tokens only.

Logits of a 32,000-word vocabulary are the largest tensor of a training step. Masked tokens need none, and the rest are
computed in chunks whose logits are recomputed in the backward pass, so the peak is one chunk, and become their own
gradient in place.

PyTorch's `linear_cross_entropy` (2.13) does as much, but gives a token's loss in the dtype of the states: with bfloat16
it is off by up to 0.05 nats (one of 9), where a run's losses are to be float32. Its gradient is as good (1.7e-3 of its
norm, the rounding of bfloat16 logits, in both).
"""

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from qd2mora.errors import InputRefused
from qd2mora.mixture import read_rows

CHUNK = 1024
IGNORE = -100
ISOLATING = ("sdpa", "eager")
"""Attention of transformers that stays within the rows of a packed line, whatever their number (tested)."""


class RowLoss(nn.Module):
    """Wraps an adapted model; its forward gives the loss of each row."""

    def __init__(self, model: PeftModel, chunk: int = CHUNK) -> None:
        super().__init__()
        self.model, self.chunk = model, chunk

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the summed cross-entropy of each row's labelled tokens, (rows,) float32, in nats."""
        labels = batch["labels"]
        keep = labels[:, 1:] != IGNORE
        hidden = labelled_states(self.model, batch, keep)
        losses = token_losses(hidden, labels[:, 1:][keep], output_head(self.model), self.chunk)
        segments = batch.get("segments")
        row_of_token = keep.nonzero()[:, 0] if segments is None else segments[:, 1:][keep]
        num_rows = len(labels) if segments is None else len(batch["task_index"])
        return losses.new_zeros(num_rows).index_add(0, row_of_token, losses)


def labelled_states(model: PeftModel, batch: dict[str, Tensor], keep: Tensor) -> Tensor:
    """Return the final hidden states at the positions of `keep` (rows or lines, length - 1), (labelled, hidden)."""
    tuner: Any = model.base_model
    if "segments" in batch:
        check_isolation(model)
    read_rows(model, batch)
    decoder = tuner.model.get_decoder()
    # Packed rows bring positions instead of a mask: transformers bounds attention where positions restart.
    told = {name: batch[name] for name in ("attention_mask", "position_ids") if name in batch}
    hidden = decoder(input_ids=batch["input_ids"], **told, use_cache=False)
    return hidden.last_hidden_state[:, :-1][keep]


def check_isolation(model: PeftModel) -> None:
    """Refuse to pack rows under an attention that may look from one row into the next. Raises InputRefused.

    Flash attention is bounded where positions restart only in a batch of one line (transformers 5.24,
    `_is_packed_sequence`); with more it runs over whole lines.
    """
    tuner: Any = model.base_model
    kind = tuner.model.config._attn_implementation
    if kind not in ISOLATING:
        raise InputRefused(
            f"data.packing: attention '{kind}' may look from one row of a line into the next; set packing: false, or "
            f"attn_implementation in the base's config.json to one of {', '.join(ISOLATING)}"
        )


def output_head(model: PeftModel) -> nn.Module:
    """Return the linear from hidden states to logits."""
    tuner: Any = model.base_model
    return tuner.model.get_output_embeddings()


def token_losses(hidden: Tensor, targets: Tensor, head: nn.Module, chunk: int = CHUNK) -> Tensor:
    """Return the cross-entropy of each token, (tokens,) float32, holding logits of at most `chunk` tokens at a time.

    `hidden` (tokens, width), `targets` (tokens,) int64. A head that is trained, or not a plain linear, goes through
    autograd, which holds twice as much; so does one that ZeRO-3 gathers when, and only when, its module is called.
    """
    is_frozen = type(head) is nn.Linear and head.bias is None and not head.weight.requires_grad
    if is_frozen and not hasattr(head.weight, "ds_id"):
        losses: Tensor = _FrozenHeadLoss.apply(hidden, targets, head.weight, chunk)
        return losses
    chunks = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    if not torch.is_grad_enabled() or len(hidden) <= chunk:
        return torch.cat([_chunk(states, target, head) for states, target in chunks])
    return torch.cat([checkpoint(_chunk, states, target, head, use_reentrant=False) for states, target in chunks])


def _chunk(states: Tensor, target: Tensor, head: nn.Module) -> Tensor:
    return F.cross_entropy(head(states).float(), target, reduction="none")


class _FrozenHeadLoss(torch.autograd.Function):
    """Cross-entropy behind a frozen linear: its logits are made twice and never kept. Accumulates in float32.

    With e_v = exp(x_v - max x) and s = sum e: the loss is log s - (x_t - max x), its gradient e / s less one at t.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, weight: Tensor, chunk: int) -> Tensor:
        losses, greatest, sums = (hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(3))
        for part in _parts(len(hidden), chunk):
            losses[part], greatest[part], sums[part] = _losses(hidden[part], targets[part], weight)
        ctx.save_for_backward(hidden, targets, weight, greatest, sums)
        ctx.chunk = chunk
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        hidden, targets, weight, *known = ctx.saved_tensors
        gradient = torch.empty_like(hidden)
        for part in _parts(len(hidden), ctx.chunk):
            of_part = (tensor[part] for tensor in (*known, gradients[0]))
            gradient[part] = _gradient(hidden[part], targets[part], weight, *of_part)
        return gradient, None, None, None


def _losses(states: Tensor, targets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the losses of a chunk, its greatest logits, and the sums of exponents below them."""
    logits = _logits(states, weight)
    greatest = logits.amax(1)
    logits.sub_(greatest[:, None])
    of_target = logits.gather(1, targets[:, None])[:, 0]
    sums = logits.exp_().sum(1)
    return sums.log() - of_target, greatest, sums


def _gradient(
    states: Tensor, targets: Tensor, weight: Tensor, greatest: Tensor, sums: Tensor, gradient: Tensor
) -> Tensor:
    """Return the gradient of a chunk's states, given that of its losses."""
    logits = _logits(states, weight).sub_(greatest[:, None]).exp_().div_(sums[:, None])
    logits.scatter_add_(1, targets[:, None], logits.new_full((len(targets), 1), -1.0))
    return logits.mul_(gradient[:, None]).to(weight.dtype) @ weight


def _parts(number: int, chunk: int) -> list[slice]:
    return [slice(start, start + chunk) for start in range(0, number, chunk)]


def _logits(states: Tensor, weight: Tensor) -> Tensor:
    """Return a chunk's logits, float32, which the caller may overwrite."""
    return F.linear(states.to(weight.dtype), weight).float()


__all__ = ["CHUNK", "RowLoss", "check_isolation", "labelled_states", "output_head", "token_losses"]
