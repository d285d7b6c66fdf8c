"""The seam between strategies and writers: every strategy ends in one static update for each adapted linear, by name.

A strategy returns `Statics`, name of the linear in the base model -> `LowRank` (A (q, d_in), B (d_out, q), scaling,
float32 on any device). q is at most min(P, Q + S + E): what comes in, or what goes out, whichever is narrower, so a
writer stores it as a plain LoRA of rank q (alpha = scaling * q) without loss, or folds it into the base's weight.
`updated_weights` does that, and covers what no LoRA can carry: a method that scales its base (`base_change`), and
PEFT's DoRA, whose linears are not among the statics.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from peft import PeftModel
from torch import Tensor

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
    # K is multiplied onto the wider side, which makes the rank that of the narrower one.
    down, up = (core @ rows, columns) if len(core) < len(rows) else (rows, columns @ core)
    return LowRank(down, up, layer.scaling(adapter_name), _base_change(layer, adapter_name))


@contextmanager
def replaced(model: PeftModel, statics: Statics, adapter_name: str = "default") -> Iterator[None]:
    """Let the linears named use their static update, as an export will, while the block runs."""
    layers = mixture_layers(model)
    # Looked up by the layers in each pass: no hook, no copy, and the routed adapter stays as it is.
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
    if scale is None:
        return 0.0
    # a_0 = 1 + 0.2 tanh(p), LightZero's bounded scale, as `MixtureLinear.base_scaled` computes it.
    return 0.2 * float(scale.detach().float().tanh())


__all__ = ["Statics", "of_core", "of_cores", "replaced"]
