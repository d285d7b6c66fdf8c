"""MixtureModel: puts mixtures into a model for PEFT, and answers questions about those that are there."""

import re
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from qd2mora.errors import InputRefused
from qd2mora.mixture.config import MixtureConfig
from qd2mora.mixture.layer import MixtureLinear, Routing, merge_refusal
from qd2mora.mixture.penalties import pairwise_overlap
from qd2mora.mixture.presets import STATIC
from qd2mora.mixture.registration import PREFIX

LLAMA_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class MixtureModel(BaseTuner):
    """PEFT's tuner for MixtureConfig. `forward` takes `task_index` (batch,) for methods that route by task."""

    prefix = PREFIX
    tuner_layer_cls = MixtureLinear
    target_module_mapping: dict[str, list[str]] = {"llama": ["q_proj", "k_proj", "v_proj"]}  # noqa: RUF012 - PEFT's

    def _pre_injection_hook(self, model: nn.Module, config: MixtureConfig, adapter_name: str) -> None:
        if "routing" not in self.__dict__:
            self.routing = Routing()

    def _create_and_replace(  # type: ignore[override]  # meets its own configuration only
        self,
        peft_config: MixtureConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        if isinstance(target, MixtureLinear):
            target.update_layer(adapter_name, peft_config)
            return
        if not isinstance(target, nn.Linear):  # bnb.nn.Linear4bit is one
            raise ValueError(f"target {current_key} is a {type(target).__name__}; mixtures go on linears")
        layer = MixtureLinear(target, adapter_name, peft_config, self.routing)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def forward(self, *args: Any, task_index: Tensor | None = None, **kwargs: Any) -> Any:
        """Run the adapted model; `task_index` stays set for the backward pass of recomputed layers, until the next."""
        self.routing.task_index = task_index
        return self.model.forward(*args, **kwargs)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        for name in self.active_adapters:
            row = self.peft_config[name].row
            if row.depends_on != STATIC:
                raise ValueError(merge_refusal(row))


def add_adapter(model: nn.Module, config: MixtureConfig, seed: int) -> PeftModel:
    """Put a mixture on a model; its initial values depend on the seed and the order of the linears alone.

    Raises InputRefused where a target matches no linear.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    targets = config.target_modules
    if isinstance(targets, str):
        patterns = {} if targets == "all-linear" else {targets: targets}
    else:
        patterns = {target: rf"(.*\.)?{re.escape(target)}" for target in targets or ()}
    for target, pattern in patterns.items():
        if not any(re.fullmatch(pattern, name) for name in names):
            there = sorted({name.rpartition(".")[2] for name in names})
            raise InputRefused(f"adapter.targets: '{target}' matches no linear; there are {', '.join(there)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def mixture_layers(model: nn.Module) -> dict[str, MixtureLinear]:
    """Return the adapted linears by their name in the base model."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, MixtureLinear)}
    return {name.removeprefix("base_model.model."): module for name, module in found.items()}


def orthogonality(model: nn.Module, adapter_name: str = "default") -> tuple[Tensor, Tensor]:
    """Return the two halves of the orthogonality penalty (down bank, up bank), unweighted float32 scalars."""
    tensors = [layer.tensors(adapter_name) for layer in mixture_layers(model).values()]
    halves = [pairwise_overlap(each[name] for each in tensors) for name in ("mixture_A", "mixture_B")]
    return halves[0], halves[1]


__all__ = ["LLAMA_LINEARS", "MixtureModel", "add_adapter", "mixture_layers", "orthogonality"]
