"""The seam between strategies and writers: every strategy ends in one static update for each adapted linear, by name.

A strategy returns `Statics`, name of the linear in the base model -> `LowRank` (A (q, d_in), B (d_out, q), scaling,
float32 on any device). q is at most min(P, Q + S + E): what comes in, or what goes out, whichever is narrower, so a
writer stores it as a plain LoRA of rank q (alpha = scaling * q) without loss, or adds `dense()` to the base's weight.
`dense_updates` is that for writers of dense weights, and covers what no LoRA can carry: a method that scales its base
(`base_change`), and PEFT's DoRA, whose linears are not among the statics.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from qd2mora.base import dense_weight
from qd2mora.mixture import MixtureLinear, mixture_layers
from qd2mora.mixture.low_rank import LowRank

Statics = Mapping[str, LowRank]


def of_cores(model: PeftModel, cores: Mapping[str, Tensor], adapter_name: str = "default") -> dict[str, LowRank]:
    """Return the static updates of a static K for each linear, see `of_core`."""
    layers = mixture_layers(model)
    return {name: of_core(layers[name], core, adapter_name) for name, core in cores.items()}


def of_core(layer: MixtureLinear, core: Tensor, adapter_name: str = "default") -> LowRank:
    """Return s B K [A; routers] as the narrower of (B, K [A; routers]) and (B K, [A; routers]), float32.

    `core` is (P + S, Q + S), or wider by the rows of the routers that read x.
    """
    rows = layer.linear_rows(adapter_name).detach().float()[: core.shape[1]]
    columns, core = layer.columns(adapter_name).detach().float(), core.float().to(rows.device)
    down, up = (core @ rows, columns) if len(core) < len(rows) else (rows, columns @ core)
    return LowRank(down, up, layer.scaling(adapter_name), _base_change(layer, adapter_name))


def dense_updates(model: PeftModel, statics: Statics, adapter_name: str = "default") -> Callable[[str], Tensor | None]:
    """Return a function from a linear's name to what its weight gains, (d_out, d_in) float32 on the CPU, or None."""
    layers: dict[str, Any] = dict(mixture_layers(model))
    by_peft = {name.removeprefix("base_model.model."): each for name, each in model.named_modules() if _is_dora(each)}

    def update(name: str) -> Tensor | None:
        if name in by_peft:
            return dora_update(by_peft[name], adapter_name)
        if name not in statics:
            return None
        static = statics[name].to(torch.device("cpu"))
        if not static.base_change:
            return static.dense()
        return static.dense() + static.base_change * dense_weight(layers[name].get_base_layer()).cpu()

    return update


@contextmanager
def replaced(model: PeftModel, statics: Statics, adapter_name: str = "default") -> Iterator[None]:
    """Let the linears named use their static update, as an export will, while the block runs."""
    layers = mixture_layers(model)
    for name, static in statics.items():
        layers[name].static_updates[adapter_name] = static
    try:
        yield
    finally:
        for name in statics:
            del layers[name].static_updates[adapter_name]


def _base_change(layer: MixtureLinear, adapter_name: str) -> float:
    """Return a_0 - 1 where a method scales its base, else 0."""
    scale = layer.tensors(adapter_name).get("mixture_base_scale")
    return 0.0 if scale is None else 0.2 * float(scale.detach().float().tanh())


def _is_dora(module: torch.nn.Module) -> bool:
    return isinstance(module, LoraLayer) and bool(module.use_dora)


def dora_update(layer: Any, adapter_name: str) -> Tensor:
    """Return m (W + s B A) / |W + s B A|_row - W of one of PEFT's DoRA linears, (d_out, d_in) float32."""
    weight = dense_weight(layer.get_base_layer()).cpu()
    down, up = (bank[adapter_name].weight.detach().float().cpu() for bank in (layer.lora_A, layer.lora_B))
    moved = weight + layer.scaling[adapter_name] * (up @ down)
    magnitude = layer.lora_magnitude_vector[adapter_name].weight.detach().float().cpu()
    return (magnitude / moved.norm(dim=1)).unsqueeze(1) * moved - weight


__all__ = ["Statics", "dense_updates", "dora_update", "of_core", "of_cores", "replaced"]
