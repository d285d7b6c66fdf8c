"""The base's weights with an export's updates added, each rounded once: rows in, new rows out, never dense as a whole.

Each weight is read (dequantised where training quantised it) and its update added in float32, a block of rows at a
time, when its turn to be written comes: the peak is one weight in float32 and what dequantising it takes, for any size.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from qd2mora.disk.tensor_file import TensorToWrite
from qd2mora.errors import InputRefused, NotFinite
from qd2mora.merging.base_weights import BaseWeights
from qd2mora.merging.static_updates import Statics
from qd2mora.mixture.low_rank import LowRank
from qd2mora.mixture.registration import MODEL_PREFIX

OUTPUT = "lm_head.weight"
INPUT = "model.embed_tokens.weight"

WeightUpdate = Callable[[Tensor, int], Tensor]
"""Takes rows of W (n, d_in) float32 and the number of the first; returns the new rows, fresh."""


def weight_updates_of(model: PeftModel, statics: Statics, adapter_name: str = "default") -> dict[str, WeightUpdate]:
    """Return the update of every adapted linear by its name; they hold copies on the CPU and not the model."""
    updates = {name: _low_rank(static.to(torch.device("cpu"))) for name, static in statics.items()}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and module.use_dora:
            updates[name.removeprefix(MODEL_PREFIX)] = _dora(module, adapter_name)
    return updates


def _low_rank(static: LowRank) -> WeightUpdate:
    """Return W + s B A, or a_0 W + s B A where the method scales its base."""

    def update(rows: Tensor, start: int) -> Tensor:
        up = static.up[start : start + len(rows)]
        # Of these rows alone: B A is never there as a whole, and float32 holds the sum until it is rounded once.
        return torch.addmm(rows, up, static.down, beta=1 + static.base_change, alpha=static.scaling)

    return update


def _dora(layer: LoraLayer, adapter_name: str) -> WeightUpdate:
    """Return m (W + s B A) / |W + s B A|_row of one of PEFT's DoRA linears."""
    banks = (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)
    down, up, magnitude = (bank.get_parameter(f"{adapter_name}.weight").detach().float().cpu() for bank in banks)
    scaling = layer.scaling[adapter_name]

    def update(rows: Tensor, start: int) -> Tensor:
        at = slice(start, start + len(rows))
        # DoRA's norm of a row (PEFT's axis: one an output) needs that row alone, so that blocks give what the whole
        # would.
        moved = torch.addmm(rows, up[at], down, alpha=scaling)
        return (magnitude[at] / moved.norm(dim=1)).unsqueeze(1) * moved

    return update


def updated_weights(
    weights: BaseWeights,
    updates: Mapping[str, WeightUpdate],
    dtype: torch.dtype,
    rounding: dict[str, float],
    read_back: Callable[[Tensor], Tensor] = Tensor.float,
) -> list[TensorToWrite]:
    """Return every weight of the base to be written in a dtype, the linears of `updates` changed.

    `rounding` takes what rounding costs each changed linear, relative to its update, while it is written. `read_back`:
    what is read of a block again, float32, where the file holds it more narrowly than in the dtype.

    Raises InputRefused where the base lacks what is to be changed; writing, NotFinite where a weight does not fit.
    """
    changed, names = weights_changed_by(updates), list(weights.names)
    if OUTPUT in changed and OUTPUT not in names:  # a tied one gets an update of its own, and is the embedding no more
        names.append(OUTPUT)
    unknown = sorted(set(changed) - set(names))
    if unknown:
        raise InputRefused(f"the base has no weight {unknown[0]}, which the adapter changes")
    tensors = []
    for name in names:
        weight = _UpdatedWeight(name, weights, changed.get(name), dtype, rounding, read_back)
        tensors.append(TensorToWrite(name, dtype, weights.shape(weight.stored_name), weight.rounded_blocks))
    return tensors


def weights_changed_by(updates: Mapping[str, WeightUpdate]) -> dict[str, WeightUpdate]:
    """Return updates of linears by the names of their weights."""
    return {f"{name}.weight": update for name, update in updates.items()}


@dataclass(frozen=True)
class _UpdatedWeight:
    """One weight on its way from the base's files into an export's; fields as `updated_weights` takes them."""

    name: str
    weights: BaseWeights
    update: WeightUpdate | None
    dtype: torch.dtype
    rounding: dict[str, float]
    read_back: Callable[[Tensor], Tensor]

    @property
    def stored_name(self) -> str:
        """Its name in the base's files: a tied output matrix stands there as the embedding."""
        if self.name in self.weights.names:
            return self.name
        return INPUT

    def rounded_blocks(self) -> Iterator[Tensor]:
        """Yield blocks of rows in the dtype. Raises NotFinite."""
        error, size = 0.0, 0.0
        for start, rows in self.weights.blocks(self.stored_name):
            if self.update is None:
                yield self._narrow(rows)
                continue
            exact = self.update(rows, start)
            narrow = self._narrow(exact)
            # Relative to the update, not to the weight: a small update is what rounding may swallow whole.
            error += float((self.read_back(narrow) - exact).square().sum())
            size += float((exact - rows).square().sum())
            yield narrow
        if self.update is not None:
            self.rounding[self.name.removesuffix(".weight")] = math.sqrt(error / size) if size else 0.0

    def _narrow(self, exact: Tensor) -> Tensor:
        narrow = exact.to(self.dtype)
        if not torch.isfinite(narrow).all():
            problem = f"{self.name}: a weight of {float(exact.abs().max()):g} does not fit"
            if self.dtype is torch.float16:
                raise NotFinite(
                    f"{problem} float16; --dtype bfloat16 (in a GGUF file q8_0) holds it, with more rounding"
                )
            raise NotFinite(f"{problem} {str(self.dtype).removeprefix('torch.')}")
        return narrow


__all__ = ["OUTPUT", "WeightUpdate", "updated_weights", "weight_updates_of", "weights_changed_by"]
