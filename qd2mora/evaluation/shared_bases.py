"""Several adapters on the weights of one base, each in a model of its own."""

import copy
from itertools import chain

import torch
from transformers import PreTrainedModel

from qd2mora.base import load_base
from qd2mora.recipe import Base


class SharedBases:
    """Gives models that share their weights: each is of its own, and may take an adapter of its own."""

    def __init__(self) -> None:
        self._loaded: dict[str, PreTrainedModel] = {}

    def __call__(self, base: Base, device: torch.device | None = None) -> PreTrainedModel:
        """Return a model of this base. Raises InputRefused."""
        key = base.model_dump_json()
        if key not in self._loaded:
            self._loaded[key] = load_base(base, device)
        return sharing_copy(self._loaded[key])


def sharing_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model of the same modules on the same tensors."""
    same: dict[int, object] = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    for module in model.modules():
        state = module.__dict__.get("quant_state")  # of bitsandbytes' linears, whose scales lie beside the weight
        if state is not None:
            same[id(state)] = state
    copied: PreTrainedModel = copy.deepcopy(model, same)
    return copied


__all__ = ["SharedBases", "sharing_copy"]
