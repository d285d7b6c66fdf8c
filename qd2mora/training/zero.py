"""DeepSpeed as the one who updates: moments, and with ZeRO-3 the frozen weights, are shared out over the processes.

The loop adds up, checks and clips a step's gradient as it always does, and hands it over whole: a loss whose gradient
is exactly that goes backward through the engine, which shards it, updates and gathers the new weights. So a step stays
whole, one that is bad or ran out of memory never reaches the engine, and processes talk once a step. Its checkpoints,
which are pickles, are never written: the small trainable state is gathered into ours, under the names and in the shapes
of a run without an engine, so that either resumes the other.
"""

from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn

from qd2mora.disk.tensor_file import Inventory, inventory_of
from qd2mora.errors import WillNotFit
from qd2mora.training.progress import State
from qd2mora.training.updates import add_gradient

MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroUpdater:
    """See Updater; `plain` is the optimiser that the engine wraps."""

    shares_moments = True

    def __init__(
        self,
        accelerator: Accelerator,
        model: PeftModel,
        parameters: dict[str, nn.Parameter],
        plain: torch.optim.Optimizer,
        moved: dict[str, nn.Parameter],
    ) -> None:
        self.accelerator, self.parameters, self.moved = accelerator, parameters, moved
        plugin: Any = accelerator.state.deepspeed_plugin
        zero = plugin.deepspeed_config["zero_optimization"]
        self.shares_weights: bool = zero["stage"] == 3
        if self.shares_weights:
            # A step adds up gradients in what is trained, so that stays whole; the rest visits layer by layer.
            zero["stage3_param_persistence_threshold"] = max(tensor.numel() for tensor in parameters.values())
        _, wrapped = accelerator.prepare(model, plain)
        self.sharded: Any = wrapped.optimizer
        if self.shares_weights:
            self._gather_trained(model)

    def _gather_trained(self, model: PeftModel) -> None:
        """Gather what is trained, for good; let every pass begin where the engine would see it begin."""
        tensors: list[Any] = list(self.parameters.values())
        tensors[0].all_gather(tensors)
        coordinator = self.sharded.parameter_offload.get_param_coordinator()
        # The loop calls the decoder, and not the model that the engine watches.
        base: Any = model.get_base_model()
        base.get_decoder().register_forward_pre_hook(lambda module, inputs: coordinator.reset_step())

    @property
    def has_moments(self) -> bool:
        return bool(self.sharded.optimizer.state)

    def moments_of(self, parameter: Tensor) -> list[Tensor]:
        """See Updater; shards have shapes of their own."""
        return []

    def backward(self, loss: Tensor) -> None:
        """See Updater. The engine would take a backward pass for a step of its own, so it sees none."""
        add_gradient(loss, self.parameters.values())

    def update(self, learning_rate: float) -> None:
        """Update with the gradients, which are those of the whole step on every process."""
        for group in self.sharded.param_groups:
            group["lr"] = learning_rate * group["factor"]
        self._step()

    def forget_gradients(self) -> None:
        for tensor in self.parameters.values():
            tensor.grad = None

    def refuse_again(self) -> None:
        """Refuse to do a step again where other processes wait in the midst of it. Raises WillNotFit."""
        if self.shares_weights:
            raise WillNotFit(
                "memory: a pass ran out of memory, and under ZeRO-3 the other processes cannot go back with this one; "
                "lower train.micro_batch and --resume"
            )

    def collect(self, *, copied: bool) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, object]]:
        from deepspeed.utils import safe_get_full_optimizer_state

        adapter = {name: tensor.detach().cpu().clone() for name, tensor in (self.parameters | self.moved).items()}
        steps = [entry["step"] for entry in self.sharded.optimizer.state.values() if "step" in entry]
        if not steps:
            return adapter, {}, {}
        moments = {}
        for name, tensor in self.parameters.items():
            # One counter for all, where a plain AdamW has one for each tensor: they are equal.
            moments[f"{name}::step"] = torch.as_tensor(steps[0], dtype=torch.float32).cpu().clone()
            for moment in MOMENTS:
                # Every process takes part, whoever writes: it is gathered from all of them.
                moments[f"{name}::{moment}"] = safe_get_full_optimizer_state(tensor, moment).cpu().clone()
        return adapter, moments, {}

    def restore(self, state: State) -> None:
        with torch.no_grad():
            for name, tensor in (self.parameters | self.moved).items():
                tensor.copy_(state.adapter[name])
        for name, tensor in self.parameters.items():
            # The engine's own float32 copy too: the next update starts from that.
            self._set(tensor, state.adapter[name])
        if not state.moments:
            return
        self._make_moments()
        for name, tensor in self.parameters.items():
            for moment in MOMENTS:
                self._set(tensor, state.moments[f"{name}::{moment}"], moment)
        first = next(iter(self.parameters))
        for entry in self.sharded.optimizer.state.values():
            entry["step"] = state.moments[f"{first}::step"].to(entry["step"].device)

    def expected(self) -> tuple[Inventory, Inventory]:
        trained: dict[str, Tensor] = {**self.parameters}
        moments = {f"{name}::{moment}": tensor for name, tensor in trained.items() for moment in MOMENTS}
        moments |= {f"{name}::step": torch.zeros(()) for name in trained}
        return inventory_of({**trained, **self.moved}), inventory_of(moments)

    def _step(self) -> None:
        # The gradient of sum(g * x) by x is g: the engine, which updates from its own backward pass, gets the step's.
        terms = [(tensor * tensor.grad).sum() for tensor in self.parameters.values() if tensor.grad is not None]
        self.forget_gradients()
        self.accelerator.backward(torch.stack(terms).sum())

    def _set(self, tensor: nn.Parameter, value: Tensor, moment: str | None = None) -> None:
        """Put a whole parameter, or a moment of it, into this process's shard."""
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        value = value.to(tensor.device)
        if self.shares_weights:
            part = self._part_of(tensor, value.flatten())
            if moment is None:
                safe_set_local_fp32_param(tensor, part)
            else:
                safe_set_local_optimizer_state(tensor, part, moment)
        elif moment is None:
            safe_set_full_fp32_param(tensor, value)
        else:
            safe_set_full_optimizer_state(tensor, value, moment)

    def _part_of(self, tensor: Any, flat: Tensor) -> Tensor:
        """Return this process's part of a whole tensor."""
        # Shards are of one size, the last one filled up with zeros, which DeepSpeed 0.19 forgets where it cuts.
        size, place = tensor.ds_tensor.numel(), self.accelerator.process_index
        filled = nn.functional.pad(flat, (0, size * self.accelerator.num_processes - len(flat)))
        return filled[size * place : size * (place + 1)]

    def _make_moments(self) -> None:
        """Do an update that changes nothing, which gives every shard its moments."""
        rates = [group["lr"] for group in self.sharded.param_groups]
        for tensor in self.parameters.values():
            tensor.grad = torch.zeros_like(tensor)
        self.update(0.0)
        for group, rate in zip(self.sharded.param_groups, rates, strict=True):
            group["lr"] = rate


__all__ = ["ZeroUpdater"]
