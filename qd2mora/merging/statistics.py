"""What one pass over calibration rows must remember of each adapted linear: moments in rank space, a few kilobytes.

For u = [A; routers that read x] x and v = K_t A x over the attended tokens: E[u u^T], E[v u^T], E[v v^T] and, where
asked for, E[K_t], accumulated in float64. With P ranks of v, Q of A x and E rows of routers these are (Q+E) x (Q+E),
P x (Q+E), P x P and P x Q: d_in and d_out do not enter.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from qd2mora.mixture import MixtureLinear, mixture_layers, read_rows


@dataclass
class Moments:
    """Sums over tokens of one linear; divide by `tokens` for means. `num_core` is Q: what of u is A x."""

    num_up: int
    num_core: int
    num_routers: int = 0
    tokens: int = 0
    uu: Tensor = field(init=False)
    vu: Tensor = field(init=False)
    vv: Tensor = field(init=False)
    mixing: Tensor = field(init=False)

    def __post_init__(self) -> None:
        num_features = self.num_core + self.num_routers
        self.uu = torch.zeros(num_features, num_features, dtype=torch.float64)
        self.vu = torch.zeros(self.num_up, num_features, dtype=torch.float64)
        self.vv = torch.zeros(self.num_up, self.num_up, dtype=torch.float64)
        self.mixing = torch.zeros(self.num_up, self.num_core, dtype=torch.float64)

    def add(self, u_TF: Tensor, v_TP: Tensor, mixing_PQ: Tensor | None = None) -> None:
        """Add tokens; one product in float32 on their device, sums in float64 on the CPU."""
        self.tokens += len(u_TF)
        num_features, joint = u_TF.shape[1], torch.cat([u_TF, v_TP], 1)
        products = (joint.T @ joint).double().cpu()
        self.uu += products[:num_features, :num_features]
        self.vu += products[num_features:, :num_features]
        self.vv += products[num_features:, num_features:]
        if mixing_PQ is not None:
            self.mixing += mixing_PQ.double().cpu()


Observe = Callable[[str, MixtureLinear, Tensor, Tensor], None]
"""Called with a linear's name, the linear, its input (..., D) and which tokens are attended (rows, length) bool."""


def collect(
    model: PeftModel,
    batches: Iterable[dict[str, Tensor]],
    adapter_name: str = "default",
    *,
    names: Collection[str] | None = None,
    with_mixing: bool = True,
) -> dict[str, Moments]:
    """Run the routed model over batches once and return the moments of every adapted linear (or of `names`) by name.

    `with_mixing`: whether to average K_t too, which mean gates need and least squares do not.
    """
    layers = {name: each for name, each in mixture_layers(model).items() if names is None or name in names}
    moments: dict[str, Moments] = {}
    for name, layer in layers.items():
        step = layer.mixture_spec[adapter_name].step
        num_core = step.width_down + step.shared
        moments[name] = Moments(step.width_up + step.shared, num_core, step.features - num_core)

    def observe(name: str, layer: MixtureLinear, x: Tensor, attended: Tensor) -> None:
        u, v = layer.rank_space(x, adapter_name, with_routers=True)
        mixing = layer.mixing(x, adapter_name)[attended].sum(0) if with_mixing else None
        moments[name].add(u[attended], v[attended], mixing)

    with torch.no_grad():
        for batch in batches:
            with observed(layers, observe, batch["attention_mask"].bool()):
                decode(model, batch)
    return moments


def decode(model: PeftModel, batch: dict[str, Tensor]) -> Tensor:
    """Return the final hidden states (rows, length, hidden), with the rows' tasks known to the routers."""
    tuner: Any = model.base_model
    read_rows(model, batch)
    decoder = tuner.model.get_decoder()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return decoder(**inputs, use_cache=False).last_hidden_state


@contextmanager
def observed(layers: dict[str, MixtureLinear], observe: Observe, attended: Tensor) -> Iterator[None]:
    """Let `observe` see every input of these linears while the block runs, but not in a first pass without adapters."""

    def hook(name: str) -> "torch.utils.hooks.RemovableHandle":
        def before(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            assert isinstance(layer, MixtureLinear)
            if not layer.disable_adapters:
                observe(name, layer, inputs[0], attended)

        return layers[name].register_forward_pre_hook(before)

    handles = [hook(name) for name in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


__all__ = ["Moments", "collect", "decode", "observed"]
