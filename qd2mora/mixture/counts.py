"""How many parameters a configuration trains, from sizes alone: no model, no weights."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

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


__all__ = ["llama_linears", "routed_linears", "trainable_parameters"]
