"""What the ledger needs of an adapted model, taken from a build on the meta device.

The code that builds the real model and its adapters builds these, so that grouped heads, tied embeddings, targets and
trainable tensors are right by construction; no weight is read.
"""

import re
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from qd2mora.memory.activations import LayerShapes, MixedMLPs
from qd2mora.memory.checkpointing import decoder_layers
from qd2mora.memory.lean import is_lean
from qd2mora.mixture import MixtureConfig, MixtureLinear, add_adapter, mixture_layers
from qd2mora.mixture.dora import dora_config, magnitudes_alone
from qd2mora.mixture.method import MLP
from qd2mora.mixture.penalties import groups_of
from qd2mora.mixture.slots import num_slots


@dataclass(frozen=True)
class Linear:
    """A linear by its name in the model."""

    name: str
    d_in: int
    d_out: int

    @property
    def entries(self) -> int:
        """Weights in it."""
        return self.d_in * self.d_out


@dataclass(frozen=True)
class Shapes:
    """What the ledger needs of an adapted model; `linears` are all but the output head."""

    linears: tuple[Linear, ...]
    layer: LayerShapes
    num_layers: int
    vocab: int
    embedding_entries: int
    head_entries: int
    other_entries: int
    trainable: tuple[int, ...]
    """Entries of each trainable tensor."""
    penalised: int
    """Entries of the largest group of banks that the orthogonality penalty stacks."""
    penalty_weight: float
    normed: int = 0
    """Entries of the largest weight whose row norms DoRA takes in every pass."""
    still: int = 0
    """Entries of adapters that are passed through and not trained, nor anything below them."""

    def __hash__(self) -> int:
        """Hash a few fields: ledgers of one model ask for its bytes again and again."""
        return hash((self.layer, self.num_layers, self.vocab, len(self.trainable)))

    def of_layers(self) -> list[list[Linear]]:
        """Return the linears of each decoder layer; a linear outside them is in none."""
        layers: dict[str, list[Linear]] = {}
        for linear in self.linears:
            found = re.search(r"\.layers\.(\d+)\.", linear.name)
            if found:
                layers.setdefault(found[1], []).append(linear)
        return list(layers.values())

    @property
    def largest_linear(self) -> int:
        """Entries of the largest decoder linear."""
        return max(linear.entries for linear in self.linears)


def read_shapes(config: PretrainedConfig, adapter: MixtureConfig, first_top_k: int | None = None) -> Shapes:
    """Build the adapted model on the meta device and take its shapes; `first_top_k`: experts that a top-k begins with.

    Raises InputRefused where a target matches no linear.
    """
    has_magnitudes = bool(adapter.row.magnitudes)
    kinds: list[str] = []  # DoRA: linears that have a magnitude, and no LoRA
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings().weight
        head_entries = head.weight.numel()
        if head.weight is embedding:
            head_entries = 0
        linears = tuple(
            Linear(name, module.in_features, module.out_features)
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module is not head
        )
        num_frozen = sum(tensor.numel() for tensor in model.parameters())
        if adapter.row.magnitudes:
            # PEFT's DoRA is no mixture; a LoRA of ours on all its linears keeps as much, and its tensors are DoRA's.
            adapter, kinds = _as_lora(model, adapter)
        layers = mixture_layers(add_adapter(model, adapter, seed=0))
    trained = [layer for name, layer in layers.items() if name.rpartition(".")[2] not in kinds]
    tensors = [pair for layer in trained for pair in layer.tensors("default").items() if pair[1].requires_grad]
    banks = [tensor for name, tensor in tensors if name in ("mixture_A", "mixture_B")]
    return Shapes(
        linears=linears,
        layer=_layer_shapes(model, linears, layers, first_top_k or 1),
        num_layers=config.num_hidden_layers,
        vocab=config.vocab_size,
        embedding_entries=embedding.numel(),
        head_entries=head_entries,
        other_entries=num_frozen - embedding.numel() - head_entries - sum(linear.entries for linear in linears),
        trainable=tuple(tensor.numel() for _, tensor in tensors)
        + tuple(layer.out_features for layer in layers.values() if has_magnitudes),
        normed=_normed(layers, has_magnitudes or adapter.experts is not None),
        penalty_weight=sum(part.weight for part in adapter.weight_penalties if part.kind.startswith("diversity")),
        penalised=max((sum(bank.numel() for bank in group) for group in groups_of(banks)), default=0),
    )


def _normed(layers: dict[str, MixtureLinear], has_magnitudes: bool) -> int:
    return max(layer.in_features * layer.out_features for layer in layers.values()) if has_magnitudes else 0


def _as_lora(model: PreTrainedModel, adapter: MixtureConfig) -> tuple[MixtureConfig, list[str]]:
    """Return a LoRA on all linears that have a magnitude, and the kinds of those that have nothing else."""
    kinds, targets = magnitudes_alone(model, adapter), dora_config(model, adapter).target_modules
    named = sorted(targets) if isinstance(targets, set) else targets
    return replace(adapter, method="lora", target_modules=named), kinds


def _layer_shapes(
    model: PreTrainedModel, linears: tuple[Linear, ...], layers: dict[str, MixtureLinear], first: int
) -> LayerShapes:
    """Take one decoder layer's widths; what adapters read is averaged over the layers."""
    slots = {name: _slots(layer, first) for name, layer in layers.items()}
    config, adapted = model.config, _inputs(layers, slots)
    steps = [layer.mixture_spec["default"].step for layer in layers.values()]
    fused = [layer.mixture_spec["default"].step.features for layer in layers.values() if not _is_mixed(layer)]
    kinds = {linear.name.rpartition(".")[2]: linear for linear in linears}
    # o_proj reads what attention keeps anyway.
    inputs = {_input_of(name): d_in for name, d_in in adapted.items() if not name.endswith(".o_proj")}
    # Means over layers are rounded up: a plan may say too much, never too little.
    shapes = LayerShapes(
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        # Heads may be wider together than the states (Qwen 3, Gemma): what o_proj reads tells in every family.
        heads_width=kinds["o_proj"].d_in,
        cached_width=kinds["o_proj"].d_in * config.num_key_value_heads // config.num_attention_heads,
        adapter_inputs=-(-sum(inputs.values()) // config.num_hidden_layers),
        # Where whole MLPs are mixed no function keeps u itself: what is kept instead is in `mixed`.
        adapter_features=-(-sum(fused) // config.num_hidden_layers),
        mixed=_mixed_mlps(layers, slots, config.num_hidden_layers),
        magnified=-(-_magnified(layers, slots) // config.num_hidden_layers),
        # The code, its gradient and its gated parts; then what goes to the up product, and its gradient.
        rank_space=max(3 * step.features + 2 * step.width_up for step in steps),
        adapts_down=any(name.endswith(".down_proj") for name in adapted),
        adapts_attention=any(name.rpartition(".")[2] not in MLP for name in adapted),
        is_lean=is_lean(model),
        slots=max(slots.values()),
    )
    return replace(shapes, **_of_family(model, kinds))


def _of_family(model: PreTrainedModel, kinds: dict[str, Linear]) -> dict[str, Any]:
    """Return what a family's layers have beside a LLaMA's, seen on the first of them."""
    first = dict(decoder_layers(model)[0].named_children())
    attention = dict(first["self_attn"].named_children())
    head_norms = head_factors = 0
    for of, name in (("q_norm", "q_proj"), ("k_norm", "k_proj")):
        if of in attention:
            weight = attention[of].weight
            assert isinstance(weight, Tensor)
            width = weight.numel()
            head_norms += kinds[name].d_out
            head_factors += kinds[name].d_out // width
    rope = model.config.rope_parameters
    return {
        "norms": sum(name.endswith("layernorm") for name in first),
        "norms_first": "input_layernorm" in first,
        "head_norms": head_norms,
        "head_factors": head_factors,
        "fused_width": kinds["qkv_proj"].d_out if "qkv_proj" in kinds else 0,
        "keeps_scores": getattr(model.config, "attn_logit_softcapping", None) is not None,
        "scales_blocks": getattr(model.config, "residual_multiplier", 1.0) != 1.0,
        "caps_logits": getattr(model.config, "final_logit_softcapping", None) is not None,
        "num_rotary": len(rope) if "full_attention" in rope else 1,
    }


def _inputs(layers: dict[str, MixtureLinear], slots: dict[str, int]) -> dict[str, int]:
    """Return the entries that each adapter reads of a token, in every slot."""
    return {
        name: layer.in_features * (slots[name] if name.endswith(".down_proj") else 1) for name, layer in layers.items()
    }


def _magnified(layers: dict[str, MixtureLinear], slots: dict[str, int]) -> int:
    """Return the entries that magnitudes scale: an output of each slot, and in an MLP's last linear what is mixed."""
    total = 0
    for name, layer in layers.items():
        if "mixture_magnitude" in layer.mixture_spec["default"].shapes:
            mixes = name.endswith(".down_proj") and slots[name] > 1
            total += (2 if mixes else 1) * slots[name] * layer.out_features
    return total


def _mixed_mlps(layers: dict[str, MixtureLinear], slots: dict[str, int], num_layers: int) -> MixedMLPs:
    """Return what one layer keeps where whole MLPs are mixed, a mean over the layers."""
    parts = [_mixed_linear(layer, slots[name]) for name, layer in layers.items() if _is_mixed(layer)]
    totals = {each.name: sum(getattr(part, each.name) for part in parts) for each in fields(MixedMLPs)}
    return MixedMLPs(**{name: -(-total // num_layers) for name, total in totals.items()})


def _mixed_linear(layer: MixtureLinear, slots: int) -> MixedMLPs:
    """Return what one linear keeps of it, as `mlp_layer` and `slots` save it; K slots, Q ranks, E experts."""
    config, spec = layer.mixture_config["default"], layer.mixture_spec["default"]
    ranks, gate = spec.step.width_down + spec.step.shared, spec.gate("down")
    assert gate is not None
    is_last, has_magnitudes = spec.place.kind == "down_proj", "mixture_magnitude" in spec.shapes
    slot_ranks = slots * ranks
    # The last one mixes in rank space before its up product, where no magnitude keeps slots apart.
    entries, floats = slot_ranks, slot_ranks
    if is_last and not has_magnitudes:
        entries, floats = ranks, 3 * slot_ranks
    num_experts, widened = spec.counts["down"], 0
    if spec.place.owns_router:
        # Its logits and weights and what they came from, what is gathered for each slot with its 64-bit index, and an
        # MLP's hidden layer.
        floats += 5 * num_experts + 4 * slots + 4
        rows = spec.shapes.get("mixture_router_down", (0,))[0]
        floats += 3 * rows if gate.score in ("mlp", "noisy") else 0
        floats += slots * num_experts if has_magnitudes else 0
        widened = layer.in_features if gate.input in ("x", "task+x") else 0
    masks = slots if is_last or config.dropout_per_expert else 1
    return MixedMLPs(
        entries=entries,
        floats=floats,
        # Where magnitudes keep slots apart nothing reads what was not dropped, which is counted as an input.
        dropped=0 if is_last and has_magnitudes else layer.in_features * masks,
        widened=widened,
        copies=ranks * (layer.in_features + layer.out_features),
        norms=num_experts * layer.out_features if has_magnitudes else 0,
    )


def _is_mixed(layer: MixtureLinear) -> bool:
    return layer.mixes_whole_mlps("default")


def _slots(layer: MixtureLinear, first: int) -> int:
    """Return the copies of a token that this linear sees or makes: one but where whole MLPs are mixed.

    `first`: the experts that a top-k begins with, in training.
    """
    if not layer.mixes_whole_mlps("default"):
        return 1
    spec = layer.mixture_spec["default"]
    gate = spec.gate("down")
    assert gate is not None
    if gate.select == "top_k":
        gate = replace(gate, top_k=max(first, gate.top_k or 1))
    return num_slots(gate, len(spec.step.ranks_down))


_READS = {"q_proj": "states", "k_proj": "states", "v_proj": "states", "gate_proj": "states", "up_proj": "states"}
"""Linears of a block that read its normed input."""


def _input_of(name: str) -> str:
    """Name what a linear reads, so that linears which read the same tensor count it once."""
    block, _, kind = name.rpartition(".")
    return f"{block}.{_READS.get(kind, kind)}"


__all__ = ["Linear", "Shapes", "read_shapes"]
