"""MixtureModel: puts mixtures into a model for PEFT and runs it; and what others ask of an adapted model."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from transformers import PreTrainedModel

from qd2mora.errors import InputRefused
from qd2mora.mixture.config import MixtureConfig
from qd2mora.mixture.dora import dora_config, freeze_beside_magnitudes, magnitudes_alone
from qd2mora.mixture.layer import MixtureLinear, mixture_layers
from qd2mora.mixture.method import MLP
from qd2mora.mixture.mlp_layer import MixtureMLPLinear, refuse_open_blocks, refuse_unfit
from qd2mora.mixture.moved_bias import moved_bias
from qd2mora.mixture.penalties import groups_of, pairwise_overlap, subspace_overlap, task_contrast
from qd2mora.mixture.registration import PREFIX
from qd2mora.mixture.routing import Routing
from qd2mora.mixture.spec import Place, linear_spec
from qd2mora.mixture.targets import refuse_unmatched
from qd2mora.mixture.trained_loras import TrainedLora
from qd2mora.routed import ops
from qd2mora.routed.gate import STATIC, FirstPass, Gate
from qd2mora.routed.text import watch_passes

FRESH = "qd2mora_fresh"
"""An adapter that is drawn to be looked at."""


class MixtureModel(BaseTuner):
    """PEFT's tuner for MixtureConfig.

    The model's forward takes, beside its own arguments, `task_index` (batch,), `group` (batch,), `external` (batch,
    width), `marks` (batch, length) and `prompt_mask` (batch, length), where a method reads them; labels tell the prompt
    too.
    """

    prefix = PREFIX
    tuner_layer_cls = MixtureLinear
    target_module_mapping: dict[str, list[str]] = {"llama": ["q_proj", "k_proj", "v_proj"]}  # noqa: RUF012 - PEFT's

    def _pre_injection_hook(self, model: nn.Module, config: MixtureConfig, adapter_name: str) -> None:
        # PEFT's tuner answers for the model's attributes too: `hasattr` would ask the base.
        if "routing" not in self.__dict__:
            self.routing = Routing()
            self._router_owners: dict[tuple[str, str], str] = {}
            watch_passes(model, self.routing, self.first_pass, self._without_adapters)

    def first_pass(self) -> FirstPass:
        """Of what routers of active adapters read the hidden states of a first pass."""
        configs = [self.peft_config[name] for name in self.active_adapters if name in self.peft_config]
        found = {config.routers.first_pass for config in configs}
        return "tokens" if "tokens" in found else "prompt" if "prompt" in found else "nothing"

    @contextmanager
    def _without_adapters(self, decoder: nn.Module) -> Iterator[None]:
        """Be the base while the block runs."""
        layers = [module for module in decoder.modules() if isinstance(module, self.tuner_layer_cls)]
        # Those alone that were on: what a caller has switched off stays off afterwards.
        enabled = [layer for layer in layers if not layer.disable_adapters]
        for layer in enabled:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in enabled:
                layer.enable_adapters(True)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Put the adapter's layers in. Raises InputRefused where they do not fit together."""
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        refuse_open_blocks(mixture_layers(model).values(), adapter_name)

    def _create_and_replace(  # type: ignore[override]  # meets its own configuration only
        self,
        peft_config: MixtureConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: object,
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
        # An adapter that is added beside an active one waits untrained, as PEFT's own do.
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _place(self, config: MixtureConfig, adapter_name: str, target: nn.Module, key: str) -> Place:
        model_config = getattr(self.model, "config", None)
        hidden = getattr(model_config, "hidden_size", 0)
        linear = target
        if isinstance(target, MixtureLinear):
            linear = target.get_base_layer()
        if isinstance(linear, nn.Linear):  # bnb.nn.Linear4bit is one
            d_in, d_out = linear.in_features, linear.out_features
        elif config.row.placement == "block" and hidden:
            d_in = d_out = hidden
        else:
            raise InputRefused(f"adapter.targets: {key} is a {type(linear).__name__}; mixtures go on linears")
        place = Place(key, d_in, d_out, getattr(model_config, "num_hidden_layers", 1), hidden)
        spec = linear_spec(config, place)
        # PEFT meets linears in the order of the model's modules, which is that of execution: the first owns.
        scopes = {gate.scope for _, gate in spec.step.gates} - {"module"}
        owns = all(
            self._router_owners.setdefault((adapter_name, place.scope_key(scope)), key) == key for scope in scopes
        )
        return replace(place, owns_router=owns)

    def forward(
        self,
        *args: object,
        task_index: Tensor | None = None,
        group: Tensor | None = None,
        external: Tensor | None = None,
        marks: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> object:
        """Run the adapted model; what is said of the rows stays set for the backward pass, until the next call."""
        routing = self.routing
        # All are set anew, None too: what an earlier batch said must not route this one.
        routing.task_index, routing.group, routing.external = task_index, group, external
        routing.marks, routing.answer_mark = marks, None
        routing.segments = routing.real = None
        if prompt_mask is None:
            routing.read_labels(kwargs.get("labels"), kwargs.get("attention_mask"))
        else:
            routing.prompt = prompt_mask.bool()
        return self.model.forward(*args, **kwargs)

    def generate(
        self,
        *args: object,
        task_index: Tensor | None = None,
        external: Tensor | None = None,
        marks: Tensor | None = None,
        **kwargs: object,
    ) -> object:
        """Continue texts with the routed adapter inside; the whole input is the prompt, whose routing is kept.

        Rows told before (`read_rows`) stay where this call names none.
        """
        routing = self.routing
        if task_index is not None:
            routing.task_index = task_index
        if external is not None:
            routing.external = external
        if marks is not None:
            routing.marks, routing.answer_mark = marks, marks.new_zeros(len(marks))
        routing.prompt = None
        return self.model.generate(*args, **kwargs)

    def after_step(self) -> None:
        """Move the selection biases by the load of the step just taken, over all processes; once an optimiser step."""
        moved = list(self._moved_biases())
        used = [self.routing.counts.get(key, torch.zeros_like(bias)).float() for key, bias, _ in moved]
        # Every process counted its own rows, and one whose rows are packed away counted none; the biases must move
        # alike everywhere, so all send all counts, in the model's order and at once.
        if used and torch.distributed.is_available() and torch.distributed.is_initialized():
            summed = torch.cat([each.flatten() for each in used])
            torch.distributed.all_reduce(summed)
            used = list(summed.split([each.numel() for each in used]))
        for (_, bias, gate), count in zip(moved, used, strict=True):
            with torch.no_grad():
                bias.copy_(moved_bias(gate, bias, count.to(bias.device, bias.dtype)))
        self.routing.counts.clear()

    def _moved_biases(self) -> Iterator[tuple[tuple[str, str], Tensor, Gate]]:
        """Yield under what key an active adapter's use of experts is counted, the bias it moves, and its gate."""
        for layer in mixture_layers(self).values():
            for adapter in layer.active_adapters:
                for role, gate in layer.mixture_spec[adapter].step.gates if adapter in layer.mixture_spec else ():
                    if gate.has_moved_bias:
                        bias = getattr(layer, f"mixture_select_bias_{role}")[adapter]
                        yield (adapter, f"{layer.place_key}:{role}"), bias, gate

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        for name in self.active_adapters:
            config = self.peft_config[name]
            if config.routers.depends_on != STATIC:
                raise ValueError(config.merge_refusal)


def add_adapter(model: nn.Module, config: MixtureConfig, seed: int) -> PeftModel:
    """Put a mixture on a model; its initial values depend on the seed and the order of the linears alone.

    Raises InputRefused where a target matches no linear.
    """
    refuse_unmatched(model, config)
    # Initial values come from torch's global generator (PEFT hands none on), which is put back afterwards.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if config.row.backend == "ours":
            adapted = get_peft_model(model, config)
        else:
            alone = magnitudes_alone(model, config)
            adapted = get_peft_model(model, dora_config(model, config))
            freeze_beside_magnitudes(adapted, alone)
    if getattr(model, "is_gradient_checkpointing", False) and isinstance(model, PreTrainedModel):
        model.disable_input_require_grads()  # PEFT asks for them as transformers does: see enable_checkpointing
    return adapted


def initial_tensors(model: PeftModel, seed: int) -> dict[str, Tensor]:
    """Return what `add_adapter` gave the tensors of an adapted model at first, by name; the adapter stays as it is."""
    config = model.peft_config["default"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.add_adapter(FRESH, replace(config, inference_mode=False))
    try:
        named = ((name, tensor) for name, tensor in model.named_parameters() if f".{FRESH}" in name)
        return {name.replace(f".{FRESH}", ".default"): tensor.detach().clone() for name, tensor in named}
    finally:
        model.delete_adapter(FRESH)


def load_experts(layers: dict[str, MixtureLinear], loras: list[TrainedLora], adapter_name: str = "default") -> None:
    """Copy trained LoRAs into the paired banks of adapted linears, expert e from the e-th.

    An expert keeps its own scale: B_e is multiplied by s_e / s, where s is the mixture's. A linear that one of them
    does not adapt gets a zero expert there. Raises InputRefused where a LoRA was trained on a linear of another size,
    or on linears that are not adapted here.
    """
    for lora in loras:
        missing = sorted(set(lora.pairs) - set(layers))
        if missing:
            raise InputRefused(f"adapter.adapters: {lora.folder} adapts {missing[0]}, which is not adapted here")
    for name, layer in layers.items():
        spec, tensors = layer.mixture_spec[adapter_name], layer.tensors(adapter_name)
        downs, ups = [], []
        ranks = [rank for rank in spec.step.ranks_down if rank]  # an expert of rank 0 is the base
        for lora, rank in zip(loras, ranks, strict=True):
            nothing = (torch.zeros(rank, layer.in_features), torch.zeros(layer.out_features, rank))
            down, up = lora.pairs.get(name, nothing)
            if down.shape != (rank, layer.in_features) or up.shape != (layer.out_features, rank):
                raise InputRefused(
                    f"adapter.adapters: {lora.folder}: {name} is {up.shape[0]} x {down.shape[1]} there and "
                    f"{layer.out_features} x {layer.in_features} here: another base?"
                )
            downs.append(down)
            ups.append(up * (lora.scaling / spec.scaling))
        with torch.no_grad():
            # One below the other, side by side: a bank of equal ranks is the same, cut by expert.
            tensors["mixture_A"].copy_(torch.cat(downs).view(tensors["mixture_A"].shape))
            tensors["mixture_B"].copy_(ops.unstack_columns(torch.cat(ups, -1), tensors["mixture_B"].shape))


@contextmanager
def adapter_off(model: PeftModel) -> Iterator[None]:
    """Be the base while the block runs; afterwards each tensor is trained or frozen as before."""
    trained = {name: tensor.requires_grad for name, tensor in model.named_parameters()}
    try:
        with model.disable_adapter():
            yield
    finally:
        # PEFT (0.21) lets every tensor of an adapter that comes back be trained, frozen ones too.
        for name, tensor in model.named_parameters():
            tensor.requires_grad_(trained[name])


def routing_of(model: nn.Module) -> Routing | None:
    """Return what a PEFT model's routers are told, None where its adapters are not mixtures."""
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, MixtureModel):
        return None
    return tuner.routing


def read_rows(model: nn.Module, batch: Mapping[str, Tensor]) -> None:
    """Tell a model's routers what a collated batch says of its rows; where there are none, do nothing."""
    routing = routing_of(model)
    if routing is not None:
        routing.read(batch)


def forgoes_cache(model: nn.Module) -> bool:
    """Whether a router of an active adapter reads a first pass over new tokens: then there is no cache in decoding."""
    tuner = getattr(model, "base_model", None)
    return isinstance(tuner, MixtureModel) and tuner.first_pass() == "tokens"


def selection_biases(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the tensors that `after_step` moves, by name: part of what a run is, though nothing trains them."""
    return {name: tensor for name, tensor in model.named_parameters() if ".mixture_select_bias_" in name}


def adapter_tensors(model: nn.Module, adapter_name: str = "default") -> list[Tensor]:
    """Return all tensors of an adapter, trained or not, layer by layer."""
    return [tensor for layer in mixture_layers(model).values() for tensor in layer.tensors(adapter_name).values()]


def after_step(model: nn.Module) -> None:
    """Do what a model's mixtures do once an optimiser step: move the selection biases against the load."""
    tuner = getattr(model, "base_model", None)
    if isinstance(tuner, MixtureModel):
        tuner.after_step()


def orthogonality(model: nn.Module, adapter_name: str = "default") -> tuple[Tensor, Tensor]:
    """Return the two halves of the orthogonality penalty (down bank, up bank), unweighted float32 scalars."""
    halves = [pairwise_overlap(_tensors(model, adapter_name, name)) for name in ("mixture_A", "mixture_B")]
    return halves[0], halves[1]


def penalty_terms(
    model: nn.Module, kind: str, adapter_name: str = "default"
) -> Iterator[tuple[str, Tensor, list[Tensor]]]:
    """Yield the terms of one penalty that reads weights: whose tensors, the unweighted float32 scalar, the tensors.

    Terms share no tensor, so each may be differentiated before the next is made: their sum never holds memory.
    """
    if kind == "task_contrast":
        tables = _tensors(model, adapter_name, "mixture_task_embedding")
        yield "mixture_task_embedding", task_contrast(tables), tables
        return
    for axis, name in enumerate(("mixture_A", "mixture_B")):
        for group in groups_of(_tensors(model, adapter_name, name)):
            if kind == "diversity_subspace":
                yield name, subspace_overlap(group, axis), group
            else:
                yield name, pairwise_overlap(group), group


def _tensors(model: nn.Module, adapter_name: str, name: str) -> list[Tensor]:
    found = (layer.tensors(adapter_name).get(name) for layer in mixture_layers(model).values())
    return [tensor for tensor in found if tensor is not None]


__all__ = [
    "MixtureModel",
    "adapter_off",
    "adapter_tensors",
    "add_adapter",
    "after_step",
    "forgoes_cache",
    "initial_tensors",
    "load_experts",
    "orthogonality",
    "penalty_terms",
    "read_rows",
    "routing_of",
    "selection_biases",
]
