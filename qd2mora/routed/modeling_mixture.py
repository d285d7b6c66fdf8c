"""A model with a routed mixture of LoRA beside its linears: this file and those it imports, on torch and transformers.

Exports of a routed adapter carry copies of them: AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
loads them anywhere, in 16 bits, or on the 4-bit weights that were trained on. For inference.

Every adapted linear (or whole MLP) is y = W x + s B K_t A x. It is computed K first: one product u = [A; shared A;
routers] x, a step in rank space v = K_t u (`ops`), one product B v. K_t is what the gates (`gate`, `routers`) make of
the token, or of the text (`text`). config.json holds, by name of a linear, what `LinearContent` says.
"""

from functools import cache
from typing import Any, TypedDict

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from .gate import FirstPass, Gate, Gates
from .ops import RankStep, features, up_product, wide
from .routers import Gating, decide
from .text import Router, Text, watch_passes


class LinearContent(TypedDict):
    """One adapted linear: its step (`ops.RankStep`), its scale, its tensors' shapes, and what its router serves.

    block: the attention or MLP whose linears share a router of scope `block`; owns_router: whether that stands here.
    is_of_whole_mlp: whether its experts are parts of whole MLPs.
    """

    step: dict[str, Any]
    scaling: float
    tensors: dict[str, list[int]]
    block: str
    owns_router: bool
    is_of_whole_mlp: bool


class MixtureForCausalLM(nn.Module):
    """What every family's model gets in front of its own class: adapted linears are wrapped, the rest stays."""

    model: Any
    text: Text
    first_pass: FirstPass
    keeps_means: bool
    # Gates are decided in float32, whatever dtype the base is loaded in.
    _keep_in_fp32_modules_strict = ("mixture",)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.text = Text(takes_all=True)
        found = {name: RoutedUpdate(name, content, self.text) for name, content in config.mixture.items()}
        for name, mixture in found.items():
            parent, _, child = name.rpartition(".")
            owner = self.get_submodule(parent)
            setattr(owner, child, RoutedLinear(getattr(owner, child), mixture))
        # Linears of whole-MLP experts run once for each expert, so their MLP has to know.
        for layer in self.model.layers:
            if any(isinstance(part, RoutedLinear) and part.mixture.is_of_whole_mlp for part in layer.mlp.children()):
                layer.mlp = RoutedMLP(layer.mlp, self.text)
        gates = [gate for mixture in found.values() for gate in mixture.gates.values()]
        self.first_pass = Gates({str(number): gate for number, gate in enumerate(gates)}).first_pass
        self.keeps_means = any(gate.is_averaged for gate in gates)
        self.register_forward_pre_hook(_read_labels, with_kwargs=True)
        watch_passes(self, self.text, lambda: self.first_pass)

    def generate(self, *args: object, **kwargs: object) -> object:
        """Generate as ever; a first pass over new tokens has no cache, and means are kept beside one."""
        if self.first_pass == "tokens" or self.keeps_means:
            kwargs["use_cache"] = self.first_pass != "tokens"
        return super().generate(*args, **kwargs)  # type: ignore[misc]  # the family's own class has it

    def train(self, mode: bool = True) -> "MixtureForCausalLM":
        """Switch modes; in neither may bitsandbytes 0.50 repack 4-bit weights, which rounds their scales to 16 bits."""
        for module in self.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                linear: Any = module
                linear.support_avx512bf16_for_cpu = False
        return super().train(mode)


def _read_labels(model: MixtureForCausalLM, args: tuple[object, ...], kwargs: dict[str, Any]) -> None:
    model.text.read_labels(kwargs.get("labels"), kwargs.get("attention_mask"))


class RoutedLinear(nn.Module):
    """y = base_layer(x) + s B K_t A x."""

    def __init__(self, base_layer: nn.Module, mixture: "RoutedUpdate") -> None:
        super().__init__()
        self.base_layer, self.mixture = base_layer, mixture

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)
        # The first pass is the base's own: its states decide the gates of the second.
        if self.mixture.text.is_first_pass:
            return y
        # Not fused as in training: a base of any kind may stand here, and nothing needs a gradient.
        return y + self.mixture(x).to(y.dtype)


class RoutedMLP(nn.Module):
    """y = sum_e g_e W2_e (act(W1_e x) * W3_e x), W_e = W + s B_e A_e: a token runs the experts it uses, in turn."""

    def __init__(self, mlp: Any, text: Text) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.act_fn, self.text = mlp.act_fn, text

    def forward(self, x: Tensor) -> Tensor:
        if self.text.is_first_pass:
            return self.expert(x)
        # Expert by expert, as the formula has it; training's one pass for all slots gives the same up to rounding.
        parts = [part.mixture for part in self.children() if isinstance(part, RoutedLinear)]
        gates = next(part for part in parts if part.owns_router).gate_of_mlp(x)
        # As many turns as the busiest token needs; others weigh their last ones with 0.
        values, experts = gates.topk(int((gates > 0).sum(-1).max()), -1)
        # Summed in float32, rounded once at the end.
        y = torch.zeros(1, device=x.device)
        for value, expert in zip(values.unbind(-1), experts.unbind(-1), strict=True):
            for part in parts:
                part.expert = F.one_hot(expert, gates.shape[-1]).float()
            y = y + value.unsqueeze(-1) * self.expert(x)
        return y.to(x.dtype)

    def expert(self, x: Tensor) -> Tensor:
        """Run the MLP with the experts that its linears were told."""
        y: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return y


class RoutedUpdate(nn.Module):
    """s B K_t A x of one linear.

    Tensors, those that the method has: down (Q + shared + router rows, D), up (O, P + shared), core, and for each role
    of a gate (down, up, core, rank) router_, bias_, out_, select_bias_ and given_ (scores that no text changes).
    `expert` (T, E) is the one expert that each token runs just now, in a mixture of whole MLPs.
    """

    down: Tensor
    up: Tensor

    def __init__(self, name: str, content: LinearContent, text: Text) -> None:
        super().__init__()
        step = content["step"]
        self.gates = Gates({role: Gate(**fields) for role, fields in step["gates"].items()})
        # JSON knows lists, and objects without an order; the rows' order is that of u.
        lists = {key: tuple(step[key]) for key in ("ranks_down", "ranks_up", "scales")}
        rows = tuple((role, number) for role, number in step["router_rows"])
        self.step = RankStep(**(step | lists | {"gates": tuple(self.gates.items()), "router_rows": rows}))
        self.scaling, self.owns_router = content["scaling"], content["owns_router"]
        self.is_of_whole_mlp = content["is_of_whole_mlp"]
        self.serves = {"module": name, "block": content["block"]}
        self.text, self.expert = text, torch.empty(0)
        for key, shape in content["tensors"].items():
            # Parameters, so that transformers loads, casts and moves them as it does its own.
            self.register_parameter(key, nn.Parameter(torch.zeros(shape), requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        u = wide(features(x, [self.down]))
        small: dict[str, Tensor] = {key: tensor for key, tensor in self.named_parameters() if key not in ("down", "up")}
        if self.is_of_whole_mlp:
            v = self.step.apply(u, small, {"down": Gating(self.expert, self.expert, self.expert)})
        else:
            for role in self.gates:
                logits = self.logits(role, x)
                if logits is not None:
                    small[f"logits_{role}"] = logits
            v = self.step.mix(u, small)
        return up_product(v, self.up, self.scaling, x.dtype)

    def gate_of_mlp(self, x: Tensor) -> Tensor:
        """Return what each whole MLP counts for a token, (T, E)."""
        logits = self.logits("down", x)
        assert logits is not None
        return decide(self.gates["down"], logits, bias=self.tensor("select_bias_down")).weight

    def logits(self, role: str, x: Tensor) -> Tensor | None:
        """Return scores that do not come out of u, or that are added to those that do; None where there are none."""
        gate, given = self.gates[role], self.tensor(f"given_{role}")
        if given is not None or gate.input in ("z", "self") or gate.reads_x:
            return given
        key = (self.serves[gate.scope], role)
        if gate.scope == "module" or self.owns_router:
            read = self.text.hidden if gate.input == "hidden" else x
            assert read is not None
            parts = [self.tensor(f"{what}_{role}") for what in ("router", "bias", "out")]
            assert parts[0] is not None
            self.text.scores[key] = Router(parts[0], parts[1], parts[2]).scores(gate, read, self.text, key)
        return self.text.scores[key]

    def tensor(self, name: str) -> Tensor | None:
        """Return a tensor that not every linear has."""
        return dict(self.named_parameters()).get(name)


CONFIGS = {
    "llama": "LlamaConfig",
    "mistral": "MistralConfig",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "gemma2": "Gemma2Config",
    "gemma3_text": "Gemma3TextConfig",
    "phi3": "Phi3Config",
    "smollm3": "SmolLM3Config",
    "olmo2": "Olmo2Config",
    "granite": "GraniteConfig",
}
"""The families that run here: transformers' `model_type`, and the class of its configuration."""
SUFFIX = "_mixture"
"""What an export's `model_type` has behind the family's."""


@cache
def classes_of(model_type: str) -> tuple[type[Any], type[Any]]:
    """Return the configuration and the model of a family; both are made once, from transformers' own classes."""
    prefix = CONFIGS[model_type].removesuffix("Config").removesuffix("Text")
    plain_config, plain_model = (getattr(transformers, name) for name in (CONFIGS[model_type], f"{prefix}ForCausalLM"))
    config: type[Any] = type(
        f"Mixture{prefix}Config", (plain_config,), {"model_type": f"{model_type}{SUFFIX}", "__module__": __name__}
    )
    content = {"config_class": config, "__module__": __name__}
    return config, type(f"Mixture{prefix}ForCausalLM", (MixtureForCausalLM, plain_model), content)


def auto_map(model_type: str) -> dict[str, str]:
    """Return what config.json says of this file, so that transformers finds the classes of a family."""
    config, model = classes_of(model_type)
    return {
        "AutoConfig": f"modeling_mixture.{config.__name__}",
        "AutoModelForCausalLM": f"modeling_mixture.{model.__name__}",
    }


def __getattr__(name: str) -> type[Any]:
    """Return a family's class by its name: of a module transformers asks for what config.json names."""
    # Made when asked for: importing ten families' code takes seconds, and a folder needs one.
    for model_type in CONFIGS:
        for kind in classes_of(model_type):
            if kind.__name__ == name:
                return kind
    raise AttributeError(name)


FILES = ("modeling_mixture.py", "gate.py", "ops.py", "routers.py", "text.py")
"""This file and those it imports."""

__all__ = ["CONFIGS", "FILES", "SUFFIX", "LinearContent", "MixtureForCausalLM", "auto_map", "classes_of"]
