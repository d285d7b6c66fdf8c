"""The heart: one layer for every mixture of LoRA, as a PEFT method.

Importing this part registers the method with PEFT.
"""

from qd2mora.mixture.config import MixtureConfig
from qd2mora.mixture.inference import shortcuts
from qd2mora.mixture.layer import MixtureLinear, mixture_layers
from qd2mora.mixture.registration import register
from qd2mora.mixture.routing import Routing
from qd2mora.mixture.tuner import (
    MixtureModel,
    adapter_off,
    adapter_tensors,
    add_adapter,
    after_step,
    forgoes_cache,
    initial_tensors,
    load_experts,
    orthogonality,
    penalty_terms,
    read_rows,
    routing_of,
    selection_biases,
)

register(MixtureConfig, MixtureModel)

__all__ = [
    "MixtureConfig",
    "MixtureLinear",
    "MixtureModel",
    "Routing",
    "adapter_off",
    "adapter_tensors",
    "add_adapter",
    "after_step",
    "forgoes_cache",
    "initial_tensors",
    "load_experts",
    "mixture_layers",
    "orthogonality",
    "penalty_terms",
    "read_rows",
    "routing_of",
    "selection_biases",
    "shortcuts",
]
