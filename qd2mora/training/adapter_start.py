"""Where an adapter starts when it does not start at random: from trained LoRAs, from the weights, from the data.

Done anew at every start, resumed ones included: it is a function of the files and the seed, and what is frozen of it is
in no checkpoint.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn

from qd2mora.base import dense_weight
from qd2mora.base.passes import last_states
from qd2mora.disk.tensor_file import stored_tensors
from qd2mora.errors import InputRefused
from qd2mora.mixture import MixtureConfig, MixtureLinear, load_experts, mixture_layers, read_rows
from qd2mora.mixture.initialisers import Activations, neuron_slices, olora, pissa, residual, singular_slices
from qd2mora.mixture.registration import MODEL_PREFIX
from qd2mora.mixture.start_folder import KEY as START
from qd2mora.mixture.start_folder import start_tensors
from qd2mora.mixture.trained_loras import read_trained_loras
from qd2mora.recipe import Recipe

EVA_BATCHES = 8
READS_NEURONS = ("down_proj", "o_proj")
"""Linears whose inputs are what a block makes inside; the others make it."""


def start_adapter(
    model: PeftModel, config: MixtureConfig, recipe: Recipe, batches: Callable[[], Iterable[dict[str, Tensor]]]
) -> dict[str, Tensor]:
    """Give a fresh adapter its start; `batches` are training rows, read only where the start is made of them.

    Returns what is to stay as it is, by the name of the parameter whose first entries it is: old experts beside new
    ones, which get no gradient.

    Raises InputRefused where a LoRA does not fit, or where LoftQ lacks the 16-bit weights.
    """
    layers = mixture_layers(model)
    if recipe.adapter.start is not None:
        return _take_over(model, recipe.adapter.start, recipe.adapter.grow)
    if recipe.adapter.adapters:
        load_experts(layers, read_trained_loras(list(recipe.adapter.adapters)))
    if config.init in ("svd", "split"):
        for number, (name, layer) in enumerate(layers.items()):
            generator = torch.Generator().manual_seed(recipe.train.seed * 1_000_003 + number)
            _start_at_slices(name, layer, config.init, generator)
    if config.shared is None:
        return {}
    kind = config.shared_init
    if kind == "eva":
        _start_from_data(model, layers, config.shared_rank, batches())
    elif kind in ("pissa", "olora", "loftq"):
        originals = None
        if kind == "loftq":
            originals = _original_weights(recipe)
        for number, (name, layer) in enumerate(layers.items()):
            # A generator a linear: what one draws must not depend on how many came before it.
            generator = torch.Generator().manual_seed(recipe.train.seed * 1_000_003 + number)
            _start_from_weight(name, layer, config, generator, originals)
    return {}


def _take_over(model: PeftModel, start: str, grow: int | None) -> dict[str, Tensor]:
    """Copy every tensor of a saved adapter, to the bit; where experts are added, freeze and return what was copied.

    Raises InputRefused where one is missing or does not fit.
    """
    there = start_tensors(start)
    wanted = {name.removeprefix(MODEL_PREFIX): tensor for name, tensor in get_peft_model_state_dict(model).items()}
    for name, tensor in wanted.items():
        found = there.get(name)
        if found is None:
            raise InputRefused(f"{START}: '{start}' has no {name}, which this base and these targets need")
        into = tensor
        if grow is not None and len(tensor) == len(found) + grow:
            into = tensor[: len(found)]
        # A LoRA of PEFT's has no axis for its one expert.
        if found.numel() != into.numel() or found.shape[-1] != into.shape[-1]:
            raise InputRefused(
                f"{START}: {name} is {tuple(found.shape)} in '{start}' and {tuple(tensor.shape)} here: another base"
            )
        if not found.isfinite().all():
            raise InputRefused(f"{START}: {name} in '{start}' is not finite")
        with torch.no_grad():
            into.copy_(found.view(into.shape))
    unused = sorted(set(there) - set(wanted))
    if unused:
        raise InputRefused(f"{START}: '{start}' has {unused[0]}, which this base has no place for")
    if grow is None:
        return {}
    return _frozen(
        model, {MODEL_PREFIX + name: len(found.view(-1, *wanted[name].shape[1:])) for name, found in there.items()}
    )


def _frozen(model: PeftModel, numbers: Mapping[str, int]) -> dict[str, Tensor]:
    """Let the first entries of trained tensors get no gradient; return copies of them by the parameter's name."""
    kept = {}
    for name, parameter in model.named_parameters():
        number = numbers.get(name.replace(".default", ""))
        if number is not None and parameter.requires_grad:
            parameter.register_hook(partial(_without_first, number))
            kept[name] = parameter.detach()[:number].clone()
    return kept


def _without_first(number: int, gradient: Tensor) -> Tensor:
    """Return a gradient that is zero in its first entries."""
    gradient = gradient.clone()  # autograd may hand the same one to others
    gradient[:number] = 0
    return gradient


def _start_from_weight(
    name: str,
    layer: MixtureLinear,
    config: MixtureConfig,
    generator: torch.Generator,
    originals: Callable[[str], Tensor] | None,
) -> None:
    linear: Any = layer.get_base_layer()
    weight, rank, scaling = dense_weight(linear), config.shared_rank, config.shared_scaling
    if min(weight.shape) < rank:
        raise InputRefused(f"adapter.shared.rank: {rank} is more than {name} has, {min(weight.shape)}")
    if config.shared_init == "olora":
        down, up = olora(weight, rank)
    elif originals is None:
        down, up = pissa(weight, rank, scaling, generator)
    else:
        down, up = residual(originals(f"{name}.weight").to(weight.device), weight, rank, scaling, generator)
    tensors = layer.tensors("default")
    with torch.no_grad():
        tensors["mixture_shared_A"].copy_(down)
        tensors["mixture_shared_B"].copy_(up)
        if config.subtracts_start:
            tensors["mixture_start_A"].copy_(down)
            tensors["mixture_start_B"].copy_(-up)


def _start_at_slices(name: str, layer: MixtureLinear, init: str, generator: torch.Generator) -> None:
    """Set the down experts to right singular vectors of the weight, expert after expert; `split`: each of its part."""
    linear: Any = layer.get_base_layer()
    bank = layer.tensors("default")["mixture_A"]
    if not isinstance(linear, nn.Linear):
        raise InputRefused(f"adapter.init: {init} starts at slices of a weight, and {name} is a whole block")
    weight = dense_weight(linear)
    ranks, parts = [bank.numel() // bank.shape[-1]], [weight]
    if init == "split":
        ranks = [bank.shape[1]] * len(bank) if bank.dim() == 3 else [*layer.mixture_spec["default"].step.ranks_down]
        parts = neuron_slices(weight, len(ranks), reads_neurons=name.endswith(READS_NEURONS))
    for part, number in zip(parts, ranks, strict=True):
        # What a part leaves out of the weight is zero there, and no direction of its own.
        directions = int(min((part != 0).any(axis).sum() for axis in (0, 1)))
        if directions < number:
            raise InputRefused(
                f"adapter.init: {init} has {directions} directions in {name} for {number} ranks; fewer experts, or a "
                "lower adapter.rank"
            )
    rows = [singular_slices(part, number, generator) for part, number in zip(parts, ranks, strict=True) if number]
    with torch.no_grad():
        bank.copy_(torch.cat(rows).view(bank.shape))


def _start_from_data(
    model: PeftModel, layers: dict[str, MixtureLinear], rank: int, batches: Iterable[dict[str, Tensor]]
) -> None:
    """Set the shared down experts to the strongest directions of what flows into each linear."""
    seen = {name: Activations(rank) for name in layers}
    attended: list[Tensor] = []

    def watching(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen[name].add(inputs[0][attended[0]])

        return before

    handles = [layer.register_forward_pre_hook(watching(name)) for name, layer in layers.items()]
    with torch.no_grad():
        for batch, _ in zip(batches, range(EVA_BATCHES), strict=False):
            attended[:] = [batch["attention_mask"].bool()]
            read_rows(model, batch)
            last_states(model, batch)
        for name, layer in layers.items():
            layer.tensors("default")["mixture_shared_A"].copy_(seen[name].directions())
    for handle in handles:
        handle.remove()


def _original_weights(recipe: Recipe) -> Callable[[str], Tensor]:
    """Return a reader of the base's 16- or 32-bit weights by name, from the safetensors of its folder."""
    folder = Path(recipe.base.model)
    if recipe.base.quantization != "nf4" or not folder.is_dir():
        raise InputRefused(
            "adapter.shared.init: loftq starts at what 4-bit quantisation lost: it needs quantization: nf4 and a "
            f"base.model that is a folder of 16-bit weights, not '{recipe.base.model}'"
        )
    stored = stored_tensors(sorted(folder.glob("*.safetensors")))

    def original(name: str) -> Tensor:
        if name not in stored:
            raise InputRefused(f"adapter.shared.init: loftq finds no 16-bit '{name}' in '{folder}'")
        return stored[name].read().float()

    return original


__all__ = ["EVA_BATCHES", "start_adapter"]
