"""What routers know of the text that runs beside a linear's input, and what they leave for each other and for later.

A hook on the decoder fills it before each pass, because `generate`, other packages' trainers and this one's loss enter
at different doors. It stays as it is for the backward pass of recomputed layers.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from .gate import FirstPass, Gate
from .ops import finish_scores, prompt_mean, unlowered, wide

IGNORE = -100
"""The label of a token that is not learned."""

Key = tuple[str, str]
"""The adapter's name, and what a router serves: a linear or a block, and the role."""


class _Cache(Protocol):
    reorder_cache: Callable[[Tensor], None]

    def get_seq_length(self) -> int: ...


@dataclass
class Text:
    """One pass over a batch of texts.

    attended, prompt: (B, T) bool; None counts every token, and knows no prompt. real: the tokens that are no padding,
    (B, T) bool, where the decoder is given no mask. segments: where rows are packed, (B, T) int64 the number of each
    token's row, -1 for padding. hidden: (B, T, H), the states of a first pass.
    is_decoding: whether a cache is continued; keeps_means: whether one is filled, so that the prompt's mean scores must
    stay. takes_all: whether a text of which nothing is said is all prompt; training asks instead of guessing.
    scores: of routers that several linears share. means: (B, 1, E), of scores over the prompt, while the answer is
    written.
    """

    attended: Tensor | None = None
    real: Tensor | None = None
    prompt: Tensor | None = None
    segments: Tensor | None = None
    hidden: Tensor | None = None
    is_decoding: bool = False
    keeps_means: bool = False
    takes_all: bool = False
    is_first_pass: bool = False
    scores: dict[Key, Tensor] = field(default_factory=dict)
    means: dict[Key, Tensor] = field(default_factory=dict)

    def read_labels(self, labels: Tensor | None, attention_mask: Tensor | None) -> None:
        """Learn from labels which tokens are the prompt."""
        self.prompt = None
        if labels is not None:
            self.prompt = prompt_of(labels, attention_mask)

    def counted(self, like: Tensor) -> Tensor:
        """Return (B, T) of ones at the tokens that count, for `like` (B, T, ...)."""
        if self.attended is None or self.attended.shape != like.shape[:2]:
            return torch.ones(like.shape[:2], device=like.device)
        return self.attended.to(like.device)

    def read_pass(self, args: tuple[object, ...], kwargs: dict[str, Any]) -> None:
        """Take from a decoder's arguments the padding, and whether this continues a cached pass."""
        inputs = kwargs.get("input_ids", kwargs.get("inputs_embeds"))
        # `input_ids` comes first in every decoder of transformers.
        if args:
            inputs = args[0]
        cache = kwargs.get("past_key_values", kwargs.get("cache"))
        # A cache that is there but empty is about to be filled: this pass is the prompt.
        self.keeps_means = cache is not None or kwargs.get("use_cache") is True
        self.is_decoding = cache is not None and cache.get_seq_length() > 0
        if cache is not None and not self.is_decoding:
            self._follow_beams(cache)
        length = 0
        if isinstance(inputs, Tensor) and inputs.dim() > 1:
            length = inputs.shape[1]
        self.attended = self._attended(kwargs.get("attention_mask"), length)
        # `generate` brings a cache and its whole input is the prompt, whatever an earlier pass said.
        if self.prompt is not None and (cache is not None or self.prompt.shape[1] != length):
            self.prompt = None

    def _attended(self, mask: object, length: int) -> Tensor | None:
        # The mask covers what the cache holds as well; this pass is its end.
        if isinstance(mask, Tensor) and mask.dim() == 2 and length:
            return mask[:, -length:].bool()
        # Packed lines come with positions and no mask, rows padded on the right may come without.
        if mask is None and self.real is not None and self.real.shape[1] == length:
            return self.real
        return None

    def _follow_beams(self, cache: _Cache) -> None:
        """Let the means go where a new cache's rows go when beam search reorders them.

        transformers 5.24 tells a cache, or a model class that has `_reorder_cache`, and no one else.
        """
        if "reorder_cache" in vars(cache):
            return  # a cache that was emptied and is filled again follows already
        reorder = cache.reorder_cache

        def both(order: Tensor) -> None:
            reorder(order)
            self.reorder_means(order)

        cache.reorder_cache = both

    def reorder_means(self, order: Tensor) -> None:
        """Follow beam search, which goes on with other rows than before: `order` (rows,)."""
        self.means = {key: mean.index_select(0, order.to(mean.device)) for key, mean in self.means.items()}

    def averaged(self, scores: Tensor, key: Key) -> Tensor:
        """Return scores (B, T, E) averaged over the prompt, (B, 1, E): as it was, while its answer is written.

        Over the prompt alone, so that no answer leaks into its own routing. Raises ValueError where no prompt is known.
        """
        prompt = self.prompt
        if prompt is None:
            if not (self.keeps_means or self.takes_all):
                raise ValueError(
                    "this adapter routes by the prompt: pass labels or prompt_mask=(batch, length) to the model"
                )
            prompt = self.counted(scores).bool()
        mean = prompt_mean(scores, prompt.to(scores.device))
        if self.keeps_means or self.takes_all:
            # For the tokens to come, which know the prompt no more; nothing is trained while text is written.
            self.means[key] = mean.detach()
        return mean


@dataclass(frozen=True)
class Router:
    """A router's tensors: `rows` (E, W) of a linear one, (2E, W) of a noisy one, (H, W) of an MLP; then what follows.

    bias: (E,) or (H,). out: (E, H), an MLP's second layer.
    """

    rows: Tensor
    bias: Tensor | None = None
    out: Tensor | None = None

    def scores(self, gate: Gate, read: Tensor, text: Text, key: Key) -> Tensor:
        """Return scores (..., E) of what is read (..., W), or (B, 1, E) where they are averaged; at least float32."""
        with unlowered(read):
            if gate.is_averaged and text.is_decoding:
                scores = text.means[key]  # one token of the answer tells nothing of the prompt
            else:
                scores = F.linear(wide(read), wide(self.rows))
                if gate.is_averaged:
                    scores = text.averaged(scores, key)
            return finish_scores(gate, scores, self.bias, self.out)


def prompt_of(labels: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return (B, T) bool: the tokens before the first label. The first token is never learned, so it always counts."""
    attended = torch.ones_like(labels, dtype=torch.bool)
    if attention_mask is not None:
        attended = attention_mask.bool()
    before = (labels != IGNORE).cumsum(-1) == 0
    # Without it a row that is learned from its start would have an empty prompt, and a mean over nothing.
    first = attended & (attended.cumsum(-1) == 1)
    return (before & attended) | first


def watch_passes(
    model: nn.Module,
    text: Text,
    first_pass: Callable[[], FirstPass],
    without_adapters: Callable[[nn.Module], AbstractContextManager[object]] = nullcontext,
) -> None:
    """Fill `text` before each pass through a model's decoder, or through the model itself where it has none.

    first_pass: of what routers want the states of a first pass now; of the prompt alone it runs once.
    without_adapters: a context in which the decoder is the base, where its linears do not look at `text.is_first_pass`
    themselves.
    """

    def before(decoder: nn.Module, args: tuple[object, ...], kwargs: dict[str, Any]) -> None:
        # The first pass is a pass as well, of the same text, inside this hook.
        if text.is_first_pass:
            return
        text.read_pass(args, kwargs)
        wanted = first_pass()
        if wanted == "tokens" or (wanted == "prompt" and not text.is_decoding):
            text.is_first_pass = True
            try:
                with without_adapters(decoder):
                    text.hidden = _first_pass(decoder, args, kwargs)
            finally:
                text.is_first_pass = False

    whole: Any = model
    # On the decoder, not the model: a loss of one's own calls the decoder alone.
    decoder: nn.Module = whole.get_decoder() if hasattr(model, "get_decoder") else model
    decoder.register_forward_pre_hook(before, with_kwargs=True)


def _first_pass(decoder: nn.Module, args: tuple[object, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return a decoder's last hidden states, (B, T, H), without gradient (X-LoRA's first pass).

    Going on from a cache would need a second one for the plain model; it is refused, and routers that read more than
    the prompt generate without one.
    """
    names = [name for name in ("past_key_values", "cache") if kwargs.get(name) is not None]
    if any(kwargs[name].get_seq_length() for name in names):
        raise ValueError("this adapter reads a first pass of the whole text: generate with use_cache=False")
    with torch.no_grad():
        return decoder(*args, **{**kwargs, **dict.fromkeys(names), "use_cache": False}).last_hidden_state


__all__ = ["IGNORE", "Key", "Router", "Text", "watch_passes"]
