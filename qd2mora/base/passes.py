"""The one place that runs the decoder: last hidden states, token losses at the price of labelled tokens, and labels.

Logits of a 32,000-word vocabulary are the largest tensor of a training step. Masked tokens need none, and the rest are
computed in chunks whose logits are recomputed in the backward pass, so the peak is one chunk, and become their own
gradient in place.

PyTorch's `linear_cross_entropy` (2.13) does as much, but gives a token's loss in the dtype of the states: with bfloat16
it is off by up to 0.05 nats (one of 9), where a run's losses are to be float32. Its gradient is as good (1.7e-3 of its
norm, the rounding of bfloat16 logits, in both).

Models are transformers' own, or PEFT's with adapters inside, whose routers are told of the rows before (`read_rows`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint
from transformers import Cache, PreTrainedModel

# At a vocabulary of 128,000: 0.5 GB of float32 logits at once; more are no faster.
CHUNK = 1024
IGNORE = -100
"""The label of a token that is not learned: what `cross_entropy` leaves out unless told otherwise."""


class Adapted(Protocol):
    """A model with adapters inside, as PEFT's are."""

    def get_base_model(self) -> nn.Module: ...


Model: TypeAlias = PreTrainedModel | Adapted


@dataclass(frozen=True)
class CachedText:
    """What was read so far: its last hidden states (rows, length, hidden), and the keys and values of its tokens."""

    states: Tensor
    cache: Cache


def last_states(model: Model, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the final hidden states of a collated batch, (rows, length, hidden), in the compute dtype."""
    # Packed rows bring positions instead of a mask: transformers bounds attention where positions restart.
    told = {name: batch[name] for name in ("attention_mask", "position_ids") if name in batch}
    # The decoder, not the model: its head would make logits of every token. Without a cache, which nobody reads here.
    decoder: nn.Module = _transformers_model(model).get_decoder()
    states: Tensor = decoder(input_ids=batch["input_ids"], **told, use_cache=False).last_hidden_state
    return states


def read_on(model: Model, batch: Mapping[str, Tensor], before: CachedText | None = None) -> CachedText:
    """Read a batch with its attention_mask and position_ids, after the text that was read before, keeping a cache.

    `attention_mask` covers the cached tokens too. The cache of `before` grows and is the one returned.
    """
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    cached: dict[str, Cache] = {}
    if before is not None:
        cached["past_key_values"] = before.cache
    decoder: nn.Module = _transformers_model(model).get_decoder()
    read = decoder(**inputs, **cached, use_cache=True)
    return CachedText(read.last_hidden_state, read.past_key_values)


@dataclass(frozen=True)
class OutputHead:
    """From last hidden states to logits: a linear, then what a family does to its output.

    logits = cap tanh(y / (divisor cap)), or y / divisor where there is no cap, with y = linear(states). Granite divides
    (`logits_scaling`), Gemma caps (`final_logit_softcapping`); others do neither.
    """

    linear: nn.Module
    divisor: float = 1.0
    cap: float | None = None

    def __call__(self, states: Tensor) -> Tensor:
        """Return logits (..., vocabulary) of states (..., hidden), float32."""
        return self.shaped(self.linear(states).float())

    def shaped(self, logits: Tensor) -> Tensor:
        """Return what the family makes of its linear's output."""
        if self.divisor != 1.0:
            logits = logits / self.divisor
        if self.cap is not None:
            logits = self.cap * torch.tanh(logits / self.cap)
        return logits

    def shape_(self, logits: Tensor) -> Tensor:
        """Do the same in place."""
        if self.divisor != 1.0:
            logits.div_(self.divisor)
        if self.cap is not None:
            logits.div_(self.cap).tanh_().mul_(self.cap)
        return logits


def output_head(model: Model) -> OutputHead:
    """Return a model's way from hidden states to logits."""
    inner = _transformers_model(model)
    divisor = getattr(inner.config, "logits_scaling", 1.0)
    return OutputHead(inner.get_output_embeddings(), divisor, getattr(inner.config, "final_logit_softcapping", None))


def device_of(model: Model) -> torch.device:
    """Return where a model's products run, and its batches belong.

    Not `model.device`, the place of its first parameter: that is the embedding, which may be kept in host memory.
    """
    device: torch.device = _transformers_model(model).get_output_embeddings().weight.device
    return device


def labelled(batch: Mapping[str, Tensor]) -> Tensor:
    """Return which states predict a label, (rows, length - 1) bool: each predicts the token after its own."""
    return batch["labels"][:, 1:] != IGNORE


def label_places(batch: Mapping[str, Tensor]) -> Tensor:
    """Return the states that predict a label by number, row by row: (labelled,) int64 among rows * length.

    A batch may bring them, counted on the host: a GPU would have the host wait for their number.
    """
    if "label_places" in batch:
        return batch["label_places"]
    return F.pad(labelled(batch), (0, 1)).flatten().nonzero()[:, 0]


def label_states(model: Model, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the final hidden states that predict a label, (labelled, hidden), in the order of `label_places`."""
    return last_states(model, batch).flatten(0, 1).index_select(0, label_places(batch))


def labels_of(batch: Mapping[str, Tensor]) -> Tensor:
    """Return the tokens that are learned, row by row, (labelled,) int64: targets of the states at `label_places`."""
    return batch["labels"].flatten().index_select(0, label_places(batch) + 1)


def token_losses(hidden: Tensor, targets: Tensor, head: OutputHead, chunk: int = CHUNK) -> Tensor:
    """Return the cross-entropy of each token, (tokens,) float32, holding logits of at most `chunk` tokens at a time.

    `hidden` (tokens, width), `targets` (tokens,) int64. A head that is trained, or not a plain linear, goes through
    autograd, which holds twice as much; so does one that ZeRO-3 gathers when, and only when, its module is called.
    """
    linear = head.linear
    # The exact type: a subclass (4-bit, adapted) multiplies in its own way, and its weight says nothing.
    is_frozen = type(linear) is nn.Linear and linear.bias is None and not linear.weight.requires_grad
    if is_frozen and not hasattr(linear.weight, "ds_id"):
        losses: Tensor = _FrozenHeadLoss.apply(hidden, targets, linear.weight, head, chunk)
        return losses
    chunks = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    if not torch.is_grad_enabled() or len(hidden) <= chunk:
        return torch.cat([_losses_by_autograd(states, target, head) for states, target in chunks])
    losses_of = [
        checkpoint(_losses_by_autograd, states, target, head, use_reentrant=False) for states, target in chunks
    ]
    return torch.cat(losses_of)


def _losses_by_autograd(states: Tensor, target: Tensor, head: OutputHead) -> Tensor:
    return F.cross_entropy(head(states), target, reduction="none")


class _FrozenHeadLoss(torch.autograd.Function):
    """Cross-entropy behind a frozen linear: its logits are made twice and never kept. Accumulates in float32.

    With e_v = exp(x_v - max x) and s = sum e: the loss is log s - (x_t - max x), its gradient e / s less one at t; of
    what is before a cap, times 1 - (x / cap)^2.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, weight: Tensor, head: OutputHead, chunk: int) -> Tensor:
        losses, greatest, sums = (hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(3))
        for part in _chunks_of(len(hidden), chunk):
            losses[part], greatest[part], sums[part] = _losses_of_chunk(hidden[part], targets[part], weight, head)
        # Two float32 numbers a token stand for its logits: with the states they give the softmax again.
        ctx.save_for_backward(hidden, targets, weight, greatest, sums)
        ctx.head, ctx.chunk = head, chunk
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        hidden, targets, weight, *known = ctx.saved_tensors
        gradient = torch.empty_like(hidden)
        for part in _chunks_of(len(hidden), ctx.chunk):
            of_part = (tensor[part] for tensor in (*known, gradients[0]))
            gradient[part] = _gradient_of_chunk(hidden[part], targets[part], weight, ctx.head, *of_part)
        return gradient, None, None, None, None


def _losses_of_chunk(
    states: Tensor, targets: Tensor, weight: Tensor, head: OutputHead
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the losses of a chunk, its greatest logits, and the sums of exponents below them."""
    logits = _logits(states, weight, head)
    greatest = logits.amax(1)
    logits.sub_(greatest[:, None])  # no exponent is above one, and no sum can overflow
    of_target = logits.gather(1, targets[:, None])[:, 0]  # before exp_ takes its place
    sums = logits.exp_().sum(1)
    return sums.log() - of_target, greatest, sums


def _gradient_of_chunk(states: Tensor, targets: Tensor, weight: Tensor, head: OutputHead, *known: Tensor) -> Tensor:
    """Return the gradient of a chunk's states; `known`: greatest logits, sums, and the gradient of the losses."""
    greatest, sums, gradient = known
    logits = _logits(states, weight, head)
    slope = None
    # Now, because the logits are overwritten: what tanh lets through, 1 - tanh^2.
    if head.cap is not None:
        slope = logits.div(head.cap).square_().neg_().add_(1)
    logits.sub_(greatest[:, None]).exp_().div_(sums[:, None])
    # Softmax less the one at the target: the gradient of cross-entropy.
    logits.scatter_add_(1, targets[:, None], logits.new_full((len(targets), 1), -1.0))
    if slope is not None:
        logits.mul_(slope)
    if head.divisor != 1.0:
        gradient = gradient / head.divisor
    # Rounded to the weight's dtype last, as autograd would round the gradient of logits that were cast to float32.
    return logits.mul_(gradient[:, None]).to(weight.dtype) @ weight


def _chunks_of(number: int, chunk: int) -> list[slice]:
    return [slice(start, start + chunk) for start in range(0, number, chunk)]


def _logits(states: Tensor, weight: Tensor, head: OutputHead) -> Tensor:
    """Return a chunk's logits, float32, which the caller may overwrite."""
    return head.shape_(F.linear(states.to(weight.dtype), weight).float())


def _transformers_model(model: Model) -> PreTrainedModel:
    """Return the transformers model, adapters inside."""
    if isinstance(model, PreTrainedModel):
        return model
    inner = model.get_base_model()
    assert isinstance(inner, PreTrainedModel)
    return inner


__all__ = [
    "CHUNK",
    "IGNORE",
    "CachedText",
    "Model",
    "OutputHead",
    "device_of",
    "label_places",
    "label_states",
    "labelled",
    "labels_of",
    "last_states",
    "output_head",
    "read_on",
    "token_losses",
]
