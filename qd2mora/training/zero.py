"""DeepSpeed as the one who updates: moments, and with ZeRO-3 the frozen weights, are shared out over the processes.

The loop adds up, checks and clips a step's gradient as it always does, and hands it over whole: a loss whose gradient
is exactly that goes backward through the engine, which shards it, updates and gathers the new weights. So a step stays
whole, one that is bad or ran out of memory never reaches the engine, and processes talk once a step. Its checkpoints,
which are pickles, are never written: the small trainable state is gathered into ours.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from qd2mora.disk.tensor_file import Inventory, inventory_of
from qd2mora.errors import WillNotFit
from qd2mora.training.state import State

MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroOptimizer:
    """Stands for the optimiser in the loop."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        parameters: dict[str, nn.Parameter],
        plain: torch.optim.Optimizer,
    ) -> None:
        self.accelerator, self.parameters = accelerator, parameters
        plugin: Any = accelerator.state.deepspeed_plugin
        zero = plugin.deepspeed_config["zero_optimization"]
        self.shares_weights: bool = zero["stage"] == 3
        if self.shares_weights:
            # A step adds up gradients in what is trained, so that stays whole; the rest visits layer by layer.
            zero["stage3_param_persistence_threshold"] = max(tensor.numel() for tensor in parameters.values())
        self.engine, wrapped = accelerator.prepare(model, plain)
        self.sharded: Any = wrapped.optimizer
        if self.shares_weights:
            self._keep_whole(model)

    def _keep_whole(self, model: nn.Module) -> None:
        """Gather what is trained, for good; let every pass begin where the engine would see it begin."""
        tensors: list[Any] = list(self.parameters.values())
        tensors[0].all_gather(tensors)
        coordinator, wrapped = self.sharded.parameter_offload.get_param_coordinator(), cast(Any, model)
        # The loop calls the decoder, and not the model that the engine watches.
        decoder: nn.Module = wrapped.base_model.model.get_decoder()
        decoder.register_forward_pre_hook(lambda module, inputs: coordinator.reset_step())

    def refuse_again(self) -> None:
        """Refuse to do a step again where other processes wait in the midst of it. Raises WillNotFit."""
        if self.shares_weights:
            raise WillNotFit(
                "memory: a pass ran out of memory, and under ZeRO-3 the other processes cannot go back with this one; "
                "lower train.micro_batch and --resume"
            )

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Return the groups, for their learning rate."""
        return self.sharded.param_groups

    @property
    def state(self) -> dict[Any, Any]:
        """Return the state of this process's shard."""
        return self.sharded.optimizer.state

    def step(self) -> None:
        """Update with the gradients, which are those of the whole step on every process."""
        terms = [(tensor * tensor.grad).sum() for tensor in self.parameters.values() if tensor.grad is not None]
        self.zero_grad()
        self.accelerator.backward(torch.stack(terms).sum())

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients that are not to be used."""
        for tensor in self.parameters.values():
            tensor.grad = None


@dataclass(frozen=True)
class ZeroState:
    """See StateSource; the names and shapes are those of a run without an engine, so that either resumes the other."""

    optimizer: ZeroOptimizer
    moved: dict[str, nn.Parameter]

    def collect(self, *, copied: bool) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
        """See StateSource."""
        from deepspeed.utils import safe_get_full_optimizer_state

        parameters = self.optimizer.parameters
        adapter = {name: tensor.detach().cpu().clone() for name, tensor in (parameters | self.moved).items()}
        steps = [entry["step"] for entry in self.optimizer.state.values() if "step" in entry]
        if not steps:
            return adapter, {}, {}
        moments = {}
        for name, tensor in parameters.items():
            moments[f"{name}::step"] = torch.as_tensor(steps[0], dtype=torch.float32).cpu().clone()
            for moment in MOMENTS:
                moments[f"{name}::{moment}"] = safe_get_full_optimizer_state(tensor, moment).cpu().clone()
        return adapter, moments, {}

    def restore(self, state: State) -> None:
        """See StateSource."""
        with torch.no_grad():
            for name, tensor in (self.optimizer.parameters | self.moved).items():
                tensor.copy_(state.adapter[name])
        for name, tensor in self.optimizer.parameters.items():
            self._set(tensor, state.adapter[name])
        if not state.moments:
            return
        self._make_moments()
        for name, tensor in self.optimizer.parameters.items():
            for moment in MOMENTS:
                self._set(tensor, state.moments[f"{name}::{moment}"], moment)
        first = next(iter(self.optimizer.parameters))
        for entry in self.optimizer.state.values():
            entry["step"] = state.moments[f"{first}::step"].to(entry["step"].device)

    def expected(self) -> tuple[Inventory, Inventory]:
        """See StateSource."""
        trained: dict[str, Tensor] = {**self.optimizer.parameters}
        moments = {f"{name}::{moment}": tensor for name, tensor in trained.items() for moment in MOMENTS}
        moments |= {f"{name}::step": torch.zeros(()) for name in trained}
        return inventory_of({**trained, **self.moved}), inventory_of(moments)

    def _set(self, tensor: nn.Parameter, value: Tensor, moment: str | None = None) -> None:
        """Put a whole parameter, or a moment of it, into this process's shard."""
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        value = value.to(tensor.device)
        if not self.optimizer.shares_weights:
            if moment is None:
                safe_set_full_fp32_param(tensor, value)
            else:
                safe_set_full_optimizer_state(tensor, value, moment)
            return
        # Shards are of one size, the last one filled up with zeros, which DeepSpeed 0.19 forgets where it cuts.
        sharded: Any = tensor
        size, place = sharded.ds_tensor.numel(), self.optimizer.accelerator.process_index
        filled = nn.functional.pad(
            value.flatten(), (0, size * self.optimizer.accelerator.num_processes - len(value.flatten()))
        )
        part = filled[size * place : size * (place + 1)]
        if moment is None:
            safe_set_local_fp32_param(tensor, part)
        else:
            safe_set_local_optimizer_state(tensor, part, moment)

    def _make_moments(self) -> None:
        """Do an update that changes nothing, which gives every shard its moments."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        for tensor in self.optimizer.parameters.values():
            tensor.grad = torch.zeros_like(tensor)
        self.optimizer.step()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


__all__ = ["ZeroOptimizer", "ZeroState"]
