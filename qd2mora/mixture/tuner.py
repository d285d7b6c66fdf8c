"""MixtureModel: puts mixtures into a model for PEFT, and runs it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from qd2mora.errors import InputRefused
from qd2mora.mixture.config import MixtureConfig
from qd2mora.mixture.layer import MixtureLinear, mixture_layers
from qd2mora.mixture.method import MLP
from qd2mora.mixture.mlp_layer import MixtureMLPLinear, refuse_open_blocks, refuse_unfit
from qd2mora.mixture.registration import PREFIX
from qd2mora.mixture.routing import Routing
from qd2mora.mixture.spec import Place, linear_spec
from qd2mora.routed.gate import STATIC
from qd2mora.routed.text import watch_passes


class MixtureModel(BaseTuner):
    """PEFT's tuner for MixtureConfig.

    The model's forward takes, beside its own arguments, `task_index` (batch,), `group` (batch,), `external` (batch,
    width) and `prompt_mask` (batch, length), where a method reads them; labels tell the prompt too.
    """

    prefix = PREFIX
    tuner_layer_cls = MixtureLinear
    target_module_mapping: dict[str, list[str]] = {"llama": ["q_proj", "k_proj", "v_proj"]}  # noqa: RUF012 - PEFT's

    def _pre_injection_hook(self, model: nn.Module, config: MixtureConfig, adapter_name: str) -> None:
        if "routing" not in self.__dict__:
            self.routing = Routing()
            self._router_owners: dict[tuple[str, str], str] = {}
            watch_passes(model, self.routing, self.reads_first_pass, self._without_adapters)

    def reads_first_pass(self) -> bool:
        """Whether a router of an active adapter reads the hidden states of a first pass."""
        configs = [self.peft_config[name] for name in self.active_adapters if name in self.peft_config]
        return any(config.routers.reads_first_pass for config in configs)

    @contextmanager
    def _without_adapters(self, decoder: nn.Module) -> Iterator[None]:
        """Be the base while the block runs."""
        layers = [module for module in decoder.modules() if isinstance(module, self.tuner_layer_cls)]
        enabled = [layer for layer in layers if not layer.disable_adapters]
        for layer in enabled:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in enabled:
                layer.enable_adapters(True)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put the adapter's layers in. Raises InputRefused where they do not fit together."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        refuse_open_blocks(mixture_layers(model).values(), adapter_name)

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
        refuse_unfit(peft_config, current_key)
        place = self._place(peft_config, adapter_name, target, current_key)
        if isinstance(target, MixtureLinear):
            target.update_layer(adapter_name, peft_config, place)
            return
        kind = MixtureLinear
        if place.kind in MLP:  # whatever the method: a second adapter here may mix whole MLPs where the first does not
            kind = MixtureMLPLinear
        layer = kind(target, adapter_name, peft_config, self.routing, place)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _place(self, config: MixtureConfig, adapter_name: str, target: nn.Module, key: str) -> Place:
        text_config: Any = getattr(self.model, "config", None)
        hidden = getattr(text_config, "hidden_size", 0)
        linear = target
        if isinstance(target, MixtureLinear):
            linear = target.get_base_layer()
        if isinstance(linear, nn.Linear):  # bnb.nn.Linear4bit is one
            d_in, d_out = linear.in_features, linear.out_features
        elif config.row.placement == "block" and hidden:
            d_in = d_out = hidden
        else:
            raise InputRefused(f"adapter.targets: {key} is a {type(linear).__name__}; mixtures go on linears")
        place = Place(key, d_in, d_out, getattr(text_config, "num_hidden_layers", 1), hidden)
        spec = linear_spec(config, place)
        scopes = {gate.scope for _, gate in spec.step.gates} - {"module"}
        owns = all(
            self._router_owners.setdefault((adapter_name, place.scope_key(scope)), key) == key for scope in scopes
        )
        return Place(key, d_in, d_out, place.num_layers, hidden, owns)

    def forward(
        self,
        *args: Any,
        task_index: Tensor | None = None,
        group: Tensor | None = None,
        external: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the adapted model; what is said of the rows stays set for the backward pass, until the next call."""
        routing = self.routing
        routing.task_index, routing.group, routing.external = task_index, group, external
        routing.segments = None
        if prompt_mask is None:
            routing.read_labels(kwargs.get("labels"), kwargs.get("attention_mask"))
        else:
            routing.prompt = prompt_mask.bool()
        return self.model.forward(*args, **kwargs)

    def generate(
        self, *args: Any, task_index: Tensor | None = None, external: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Continue texts with the routed adapter inside; the whole input is the prompt, whose routing is kept.

        Rows told before (`read_rows`) stay where this call names none.
        """
        routing = self.routing
        if task_index is not None:
            routing.task_index = task_index
        if external is not None:
            routing.external = external
        routing.prompt = None
        return self.model.generate(*args, **kwargs)

    def after_step(self) -> None:
        """Move the selection biases against the load of the step just taken; once an optimiser step.

        d_e += rate * sign(mean load - load_e), over all processes (FlyLoRA's rule, with the mean count).
        """
        layers = {layer.place_key: layer for layer in mixture_layers(self).values()}
        for (adapter, key), used in self.routing.counts.items():
            name, _, role = key.rpartition(":")
            layer = layers[name]
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(used)
            gate = layer.mixture_spec[adapter].gate(role)
            assert gate is not None
            bias = getattr(layer, f"mixture_select_bias_{role}")[adapter]
            with torch.no_grad():
                bias.add_(gate.bias_rate * (used.mean() - used).sign().to(bias.device, bias.dtype))
        self.routing.counts.clear()

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        for name in self.active_adapters:
            config = self.peft_config[name]
            if config.routers.depends_on != STATIC:
                raise ValueError(config.merge_refusal)


__all__ = ["MixtureModel"]
