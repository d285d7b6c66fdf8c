"""How many parameters a configuration trains, and what sizes its tensors have: no model is built, no weight read."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import nn

from qd2mora.mixture.config import MixtureConfig
from qd2mora.mixture.spec import LinearSpec, Place, linear_spec


def trainable_parameters(
    config: MixtureConfig, linears: Mapping[str, tuple[int, int]], num_layers: int, hidden: int
) -> int:
    """Return the trained parameters of a stack of layers; `linears` is one layer's, name to (d_out, d_in).

    Names are a layer's own, such as `self_attn.q_proj`, in the order of execution. Raises InputRefused.
    """
    total = 0
    for spec in _specs(config, linears, num_layers, hidden):
        total += sum(math.prod(shape) for key, shape in spec.shapes.items() if key not in spec.frozen)
    kinds = {*_targets(config, linears), *config.row.magnitudes} if config.row.magnitudes else set()
    return total + num_layers * sum(d_out for name, (d_out, _) in linears.items() if name.rpartition(".")[2] in kinds)


def routed_linears(config: MixtureConfig, linears: Mapping[str, tuple[int, int]], num_layers: int, hidden: int) -> int:
    """Return how many linears have a gate that is not constant. Raises InputRefused."""
    return sum(bool(spec.step.gates) for spec in _specs(config, linears, num_layers, hidden))


def other_sizes(
    config: MixtureConfig, model: nn.Module, there: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Yield (name, shape in `there`, shape asked for) of stored tensors that a configuration would make otherwise.

    `there`: shapes by name, such as `model.layers.0.self_attn.q_proj.mixture_A`. What is made is made before it is
    compared: experts of a few kilobytes may be asked for by the thousand. Raises InputRefused.
    """
    sizes = getattr(model, "config", None)
    num_layers, hidden = getattr(sizes, "num_hidden_layers", 1), getattr(sizes, "hidden_size", 0)
    modules = dict(model.named_modules())
    specs: dict[str, LinearSpec] = {}
    for name, shape in there.items():
        key, _, kind = name.rpartition(".")
        module = modules.get(key)
        if not kind.startswith("mixture_") or module is None:
            continue
        if key not in specs:
            # Blocks take and give hidden states.
            d_in = d_out = hidden
            if isinstance(module, nn.Linear):
                d_in, d_out = module.in_features, module.out_features
            specs[key] = linear_spec(config, Place(key, d_in, d_out, num_layers, hidden))
        wanted = specs[key].shapes.get(kind, shape)
        if wanted != shape:
            yield name, shape, wanted


def _specs(
    config: MixtureConfig, linears: Mapping[str, tuple[int, int]], num_layers: int, hidden: int
) -> Iterator[LinearSpec]:
    for layer in range(num_layers):
        # The first linear of a scope has its router, as when the tuner puts adapters in.
        owners: set[str] = set()
        for name, (d_out, d_in) in linears.items():
            place = Place(f"layers.{layer}.{name}", d_in, d_out, num_layers, hidden)
            if place.kind not in _targets(config, linears):
                continue
            shared = {place.scope_key(gate.scope) for gate in config.routers.values() if gate.scope != "module"}
            yield linear_spec(config, replace(place, owns_router=not shared & owners))
            owners |= shared


def _targets(config: MixtureConfig, linears: Mapping[str, tuple[int, int]]) -> set[str]:
    if config.target_modules == "all-linear":
        return {name.rpartition(".")[2] for name in linears}
    return set(config.target_modules or ())


def llama_linears(hidden: int, intermediate: int, heads_width: int, kv_width: int) -> dict[str, tuple[int, int]]:
    """Return a LLaMA layer's linears, and its MLP as a whole, name to (d_out, d_in)."""
    return {
        "self_attn.q_proj": (heads_width, hidden),
        "self_attn.k_proj": (kv_width, hidden),
        "self_attn.v_proj": (kv_width, hidden),
        "self_attn.o_proj": (hidden, heads_width),
        "mlp": (hidden, hidden),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }


__all__ = ["llama_linears", "other_sizes", "routed_linears", "trainable_parameters"]
