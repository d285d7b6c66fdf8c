"""What one pass over calibration rows must remember of each adapted linear: moments in rank space, a few kilobytes.

For u = A x and v = K_t u over the attended tokens: E[u u^T], E[v u^T], E[v v^T] and E[K_t], accumulated in float64.
With P = N*r and Q = M*r these are Q x Q, P x Q, P x P and P x Q: d_in and d_out do not enter.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from qd2mora.mixture import MixtureLinear, mixture_layers, read_rows


@dataclass
class Moments:
    """Sums over tokens of one linear; divide by `tokens` for means."""

    num_up: int
    num_down: int
    tokens: int = 0
    uu: Tensor = field(init=False)
    vu: Tensor = field(init=False)
    vv: Tensor = field(init=False)
    mixing: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.uu = torch.zeros(self.num_down, self.num_down, dtype=torch.float64)
        self.vu = torch.zeros(self.num_up, self.num_down, dtype=torch.float64)
        self.vv = torch.zeros(self.num_up, self.num_up, dtype=torch.float64)
        self.mixing = torch.zeros(self.num_up, self.num_down, dtype=torch.float64)

    def add(self, u_TQ: Tensor, v_TP: Tensor, mixing_PQ: Tensor) -> None:
        """Add tokens; products in float32 on their device, sums in float64 on the CPU."""
        self.tokens += len(u_TQ)
        self.uu += (u_TQ.T @ u_TQ).double().cpu()
        self.vu += (v_TP.T @ u_TQ).double().cpu()
        self.vv += (v_TP.T @ v_TP).double().cpu()
        self.mixing += mixing_PQ.double().cpu()


def collect(
    model: PeftModel, batches: Iterable[dict[str, Tensor]], adapter_name: str = "default"
) -> dict[str, Moments]:
    """Run the routed model over batches and return the moments of every adapted linear by name."""
    layers = mixture_layers(model)
    moments: dict[str, Moments] = {}
    for name, layer in layers.items():
        step = layer.mixture_spec[adapter_name].step
        moments[name] = Moments(step.width_up + step.shared, step.width_down + step.shared)
    attended: list[Tensor] = []
    with _observed(layers, moments, attended, adapter_name), torch.no_grad():
        for batch in batches:
            attended[:] = [batch["attention_mask"].bool()]
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
def _observed(
    layers: dict[str, MixtureLinear], moments: dict[str, Moments], attended: list[Tensor], adapter_name: str
) -> Iterator[None]:
    def observe(name: str, layer: MixtureLinear, x: Tensor) -> None:
        u, v = layer.rank_space(x, adapter_name)
        mixing = layer.mixing(x, adapter_name)[attended[0]].sum(0)
        moments[name].add(u[attended[0]], v[attended[0]], mixing)

    def hook(name: str) -> "torch.utils.hooks.RemovableHandle":
        def before(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            assert isinstance(layer, MixtureLinear)
            if layer.disable_adapters:  # a first pass that routers read
                return
            observe(name, layer, inputs[0])

        return layers[name].register_forward_pre_hook(before)

    handles = [hook(name) for name in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


__all__ = ["Moments", "collect", "decode"]
