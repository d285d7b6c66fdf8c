"""An adapted model, from outside: put a mixture on a base, tell its routers of rows, weigh its tensors."""

import re
from collections.abc import Iterator, Mapping

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from qd2mora.errors import InputRefused
from qd2mora.mixture.config import MixtureConfig
from qd2mora.mixture.layer import MixtureLinear, mixture_layers
from qd2mora.mixture.penalties import groups_of, pairwise_overlap, subspace_overlap, task_contrast
from qd2mora.mixture.routing import Routing
from qd2mora.mixture.trained_loras import TrainedLora
from qd2mora.mixture.tuner import MixtureModel
from qd2mora.routed import ops


def add_adapter(model: nn.Module, config: MixtureConfig, seed: int) -> PeftModel:
    """Put a mixture on a model; its initial values depend on the seed and the order of the linears alone.

    Raises InputRefused where a target matches no linear.
    """
    _refuse_unmatched(model, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = get_peft_model(model, _on_backend(config))
    if getattr(model, "is_gradient_checkpointing", False) and isinstance(model, PreTrainedModel):
        model.disable_input_require_grads()  # PEFT asks for them as transformers does: see enable_checkpointing
    return adapted


def _refuse_unmatched(model: nn.Module, config: MixtureConfig) -> None:
    """Raise InputRefused where a target matches no linear, or no module where the method stands beside any."""
    is_beside_blocks = config.row.placement == "block"
    names = [name for name, module in model.named_modules() if is_beside_blocks or isinstance(module, nn.Linear)]
    for target, pattern in _patterns(config.target_modules).items():
        if not any(re.fullmatch(pattern, name) for name in names):
            there = sorted({name.rpartition(".")[2] for name in names})
            raise InputRefused(f"adapter.targets: '{target}' matches no linear; there are {', '.join(there)}")


def _patterns(targets: list[str] | str | None) -> dict[str, str]:
    """Return what each target matches: a list names the last parts of modules, a text is itself a pattern."""
    if targets == "all-linear":
        return {}
    if isinstance(targets, str):
        return {targets: targets}
    return {target: rf"(.*\.)?{re.escape(target)}" for target in targets or ()}


def _on_backend(config: MixtureConfig) -> PeftConfig:
    """Return the configuration itself, or PEFT's own where the method runs on PEFT's implementation (DoRA)."""
    if config.row.backend == "ours":
        return config
    assert config.rank is not None and config.alpha is not None
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # PEFT divides by the rank alone
        lora_dropout=config.dropout,
        use_rslora=config.rank_stabilized,
        use_dora=True,
        target_modules=config.target_modules,
        exclude_modules=config.exclude_modules,
        task_type=config.task_type,
    )


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
        for lora, rank in zip(loras, spec.step.ranks_down, strict=True):
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


def reads_first_pass(model: nn.Module) -> bool:
    """Whether a router of an active adapter reads a first pass: then there is no cache while decoding."""
    tuner = getattr(model, "base_model", None)
    return isinstance(tuner, MixtureModel) and tuner.reads_first_pass()


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
    "adapter_tensors",
    "add_adapter",
    "after_step",
    "load_experts",
    "orthogonality",
    "penalty_terms",
    "read_rows",
    "reads_first_pass",
    "routing_of",
    "selection_biases",
]
