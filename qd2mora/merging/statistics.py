"""What one pass over calibration rows must remember of each adapted linear: moments in rank space, a few kilobytes.

For u = [A; routers that read x] x and v = K_t A x over weighted tokens: E[u u^T], E[v u^T], E[v v^T] and, where asked
for, E[K_t], accumulated in float64. With P ranks of v, Q of A x and E rows of routers these are (Q+E) x (Q+E),
P x (Q+E), P x P and P x Q: d_in and d_out do not enter. The layers hand over the u and v of their own forward pass, so
that a pass costs what it costs without statistics, and one small product for each linear and batch.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from qd2mora.base.passes import labelled, last_states
from qd2mora.mixture import MixtureLinear, mixture_layers, read_rows
from qd2mora.routed.ops import wide
from qd2mora.terminal.pace import paced

Batch = Mapping[str, Tensor]


@dataclass
class Moments:
    """Weighted sums over tokens of one linear; divide by `tokens`, the weights' sum, for means.

    `num_core` is Q: what of u is A x.
    """

    num_up: int
    num_core: int
    num_routers: int = 0
    tokens: float = 0
    second: Tensor = field(init=False)
    mixing: Tensor = field(init=False)

    def __post_init__(self) -> None:
        width = self.num_core + self.num_routers + self.num_up
        # One symmetric matrix of [u; v] holds all three second moments; float64, because millions of tokens add up
        # here.
        self.second = torch.zeros(width, width, dtype=torch.float64)
        self.mixing = torch.zeros(self.num_up, self.num_core, dtype=torch.float64)

    @property
    def uu(self) -> Tensor:
        """E[u u^T] times `tokens`, (F, F)."""
        return self.second[: -self.num_up, : -self.num_up]

    @property
    def vu(self) -> Tensor:
        """E[v u^T] times `tokens`, (P, F)."""
        return self.second[-self.num_up :, : -self.num_up]

    @property
    def vv(self) -> Tensor:
        """E[v v^T] times `tokens`, (P, P)."""
        return self.second[-self.num_up :, -self.num_up :]

    def add(self, u: Tensor, v: Tensor, root: Tensor, mixing_PQ: Tensor | None = None) -> None:
        """Add tokens u (..., F), v (..., P), `root` (...) of whose weights is given; one product on their device.

        The sums stay there until `collect` is done: fetching them would wait for the device at every linear.
        """
        # Rows scaled by the root of their weight: one product then gives all three second moments, weighted.
        joint_TW = torch.cat([u.to(v.dtype), v], -1).mul_(root.unsqueeze(-1)).flatten(0, -2)
        # A batch's own product is short enough for float32; only the sum over batches is not.
        self.second = self.second.to(v.device).add_(joint_TW.T @ joint_TW)
        if mixing_PQ is not None:
            self.mixing = self.mixing.to(v.device).add_(mixing_PQ)


Weigh = Callable[[Batch], Tensor]
"""Returns what each token of a batch counts for, (rows, length) float32, 0 at padding."""


def attended(batch: Batch) -> Tensor:
    """Return 1 for every token of a row."""
    return batch["attention_mask"].float()


def balanced(batch: Batch) -> Tensor:
    """Return weights: a row's tokens that predict a label count a half together, its others the other half.

    Answers are short and prompts long: with every token alike, what decides an answer hardly counts.
    """
    # A half each, measured: 99.6% of the gain kept on seven reasoning tasks; every token alike 99.4%, nine tenths for
    # answers 99.3%.
    every = batch["attention_mask"].float()
    answer = F.pad(labelled(batch).float(), (0, 1)) * every
    parts = (answer, every - answer)
    # A row without labelled tokens counts a half, by its prompt.
    return torch.stack([0.5 * part / part.sum(1, keepdim=True).clamp_min(1) for part in parts]).sum(0)


Observe = Callable[[str, MixtureLinear, Tensor, Tensor], None]
"""Called with a linear's name, the linear, its input (..., D) and which tokens are attended (rows, length) bool."""


def collect(
    model: PeftModel,
    batches: Sequence[dict[str, Tensor]],
    adapter_name: str = "default",
    *,
    names: Collection[str] | None = None,
    with_mixing: bool = True,
    weigh: Weigh = attended,
    is_shown: bool = True,
) -> dict[str, Moments]:
    """Run the routed model over batches once and return the moments of every adapted linear (or of `names`) by name.

    `with_mixing`: whether to average K_t too, which mean gates need and least squares do not. `weigh`: what tokens are
    worth. `is_shown`: tell how far it is.
    """
    layers = {name: each for name, each in mixture_layers(model).items() if names is None or name in names}
    moments: dict[str, Moments] = {}
    for name, layer in layers.items():
        step = layer.mixture_spec[adapter_name].step
        num_core = step.width_down + step.shared
        moments[name] = Moments(step.width_up + step.shared, num_core, step.features - num_core)
    with torch.no_grad():
        for batch in paced("statistics of training rows, batches", batches, is_shown=is_shown):
            weight = weigh(batch)
            total = float(weight.sum())
            for each in moments.values():
                each.tokens += total
            with _watched(layers, moments, weight, adapter_name, with_mixing):
                decode(model, batch)
    for each in moments.values():
        # Closed forms are solved on the CPU: small matrices, in float64, in which GPUs are slow.
        each.second, each.mixing = each.second.cpu(), each.mixing.cpu()
    return moments


@contextmanager
def _watched(
    layers: dict[str, MixtureLinear],
    moments: dict[str, Moments],
    weight: Tensor,
    adapter_name: str,
    with_mixing: bool,
) -> Iterator[None]:
    """Add what these linears compute in rank space to their moments while the block runs."""
    root = weight.sqrt()

    def watch(name: str, u: Tensor, v: Tensor, small: dict[str, Tensor]) -> None:
        # The sum over tokens is made of the gates: no K_t of any token is formed, and a pass costs 1.3 to 1.4 plain
        # ones, not 3.
        step = layers[name].mixture_spec[adapter_name].step
        mixing = step.summed_mixing(wide(u), small, weight) if with_mixing else None
        moments[name].add(u, v, root, mixing)

    def observe(name: str, layer: MixtureLinear, x: Tensor, _: Tensor) -> None:
        # Experts that are whole MLPs have a rank space of their own, which their forward pass does not go through.
        u, v = layer.rank_space(x, adapter_name, with_routers=True)
        mixing = torch.einsum("...pq,...->pq", layer.mixing(x, adapter_name), weight) if with_mixing else None
        moments[name].add(u, v, root, mixing)

    slotted = {name: layer for name, layer in layers.items() if layer.mixes_whole_mlps(adapter_name)}
    plain = [layers[name] for name in layers if name not in slotted]
    for name in layers.keys() - slotted.keys():
        layers[name].watchers[adapter_name] = partial(watch, name)
    try:
        with observed(slotted, observe, weight > 0):
            yield
    finally:
        for layer in plain:
            layer.watchers.pop(adapter_name, None)


def decode(model: PeftModel, batch: Batch) -> Tensor:
    """Return the final hidden states (rows, length, hidden), with the rows' tasks known to the routers."""
    read_rows(model, batch)
    return last_states(model, batch)


@contextmanager
def observed(layers: dict[str, MixtureLinear], observe: Observe, attended: Tensor) -> Iterator[None]:
    """Let `observe` see every input of these linears while the block runs, but not in a first pass without adapters."""

    def hook(name: str) -> "torch.utils.hooks.RemovableHandle":
        def before(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            assert isinstance(layer, MixtureLinear)
            # A first pass (X-LoRA's) runs the same linears as the base alone; its tokens would count twice.
            if not layer.disable_adapters:
                observe(name, layer, inputs[0], attended)

        return layers[name].register_forward_pre_hook(before)

    handles = [hook(name) for name in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


__all__ = ["Moments", "attended", "balanced", "collect", "decode", "observed"]
