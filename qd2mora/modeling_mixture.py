"""A LLaMA with a routed mixture of LoRA beside its linears, in one file that needs torch and transformers alone.

Exports of a routed adapter carry a copy of this file: AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=
True) loads them anywhere, in 16 bits, or on the 4-bit weights that were trained on. For inference.

Every adapted linear (or whole MLP) is y = W x + s B K_t A x. It is computed K first: one product u = [A; shared A;
routers] x, a step in rank space v = K_t u, one product B v. K_t is what the gates make of the token; a gate is a row of
six fields:
  input        what its router reads: x (the linear's input), z (the code after the down experts), self (the ranks'
               own activations), hidden (the last states of a first pass without adapters), given (nothing: its scores
               are fixed)
  granularity  token, or the mean of the scores over the prompt (sequence) or over the tokens so far (prefix)
  scope        module, or block / model: the first linear of the scope scores, the others take its scores
  score        linear, bias, mlp, noisy (noise belongs to training), prototype, activation
  select       all, top_k, top_p, entropy, switch, sample (without noise: the top k)
  weight       softmax, renorm, sigmoid, uniform, one, straight_through, bounded

Shapes: T tokens (any leading axes), D d_in, O d_out, R rank, M down experts, N up experts, E experts, Q all down ranks,
P all up ranks. Rank space is float32.
"""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import LlamaConfig, LlamaForCausalLM

EPS = 1e-5


class MixtureLlamaConfig(LlamaConfig):
    """LLaMA's configuration and `mixture`: by name of a linear its tensors' shapes, its step and its gates."""

    model_type = "llama_mixture"


class MixtureLlamaForCausalLM(LlamaForCausalLM):
    """The model; adapted linears are wrapped, everything else is transformers' own."""

    config_class = MixtureLlamaConfig
    _keep_in_fp32_modules_strict = ("mixture",)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.text = Text()
        for name, spec in config.mixture.items():
            parent, _, child = name.rpartition(".")
            owner = self.get_submodule(parent)
            setattr(owner, child, RoutedLinear(getattr(owner, child), spec, self.text))
        for layer in self.model.layers:
            if any(isinstance(part, RoutedLinear) and part.mixture.is_of_whole_mlps for part in layer.mlp.children()):
                layer.mlp = RoutedMLP(layer.mlp, self.text)
        gates = [gate for spec in config.mixture.values() for gate in spec["gates"].values()]
        self.text.reads_first_pass = any(gate["input"] == "hidden" for gate in gates)
        self.keeps_means = any(gate["granularity"] != "token" for gate in gates)
        self.register_forward_pre_hook(_read_labels, with_kwargs=True)
        self.model.register_forward_pre_hook(partial(_read_text, self.text), with_kwargs=True)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as ever; a first pass has no cache, and means are kept beside one."""
        if self.text.reads_first_pass or self.keeps_means:
            kwargs["use_cache"] = not self.text.reads_first_pass
        return super().generate(*args, **kwargs)

    def _reorder_cache(self, cache: Any, order: Tensor) -> Any:
        """Let the running means follow a beam search."""
        cache.reorder_cache(order)
        self.text.means = {
            key: [part.index_select(0, order.to(part.device)) for part in parts]
            for key, parts in self.text.means.items()
        }
        return cache

    def train(self, mode: bool = True) -> "MixtureLlamaForCausalLM":
        """Switch modes; in neither may bitsandbytes 0.50 repack 4-bit weights, which rounds their scales to 16 bits."""
        for module in self.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        return super().train(mode)


@dataclass
class Text:
    """What the mixtures know of the text that runs, and leave for each other.

    scores: of routers that several linears share. counted, prompt: (B, T), the tokens that are no padding, and those of
    them that are asked, which are all where there are no labels. means: of scores, kept while the answer is written.
    hidden: (B, T, H), of a first pass. expert: (T, E), the one expert that each token runs just now, in a mixture of
    whole MLPs.
    """

    scores: dict[str, Tensor] = field(default_factory=dict)
    labels: Tensor | None = None
    counted: Tensor | None = None
    prompt: Tensor | None = None
    is_decoding: bool = False
    means: dict[str, list[Tensor]] = field(default_factory=dict)
    reads_first_pass: bool = False
    is_first_pass: bool = False
    hidden: Tensor | None = None
    expert: Tensor | None = None

    def averaged(self, scores: Tensor, key: str, granularity: str) -> Tensor:
        """Return scores (B, T, E) averaged over the prompt, (B, 1, E), or at each token over those so far."""
        if granularity == "sequence":
            if not self.is_decoding:
                asked = _column(self.prompt, scores)
                self.means[key] = [(scores * asked).sum(-2, keepdim=True) / asked.sum(-2, keepdim=True).clamp_min(1)]
            return self.means[key][0]
        counted = _column(self.counted, scores)
        summed, number = (scores * counted).cumsum(-2), counted.cumsum(-2)
        if self.is_decoding:
            summed, number = summed + self.means[key][0], number + self.means[key][1]
        self.means[key] = [summed[:, -1:], number[:, -1:]]
        return summed / number.clamp_min(1)


def _column(mask: Tensor | None, scores: Tensor) -> Tensor:
    return torch.ones_like(scores[..., :1]) if mask is None else mask.to(scores).unsqueeze(-1)


def _read_labels(model: "MixtureLlamaForCausalLM", args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    model.text.labels = kwargs.get("labels")


def _read_text(text: Text, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a pass: see which tokens count and which are asked, and run the first pass that some routers read."""
    if text.is_first_pass:
        return
    ids: Any = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs_embeds"))
    ids = kwargs.get("inputs_embeds") if ids is None else ids
    mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values", kwargs.get("cache"))
    text.is_decoding = cache is not None and cache.get_seq_length() > 0
    text.counted = mask[:, -ids.shape[1] :].bool() if mask is not None and mask.dim() == 2 else None
    text.prompt, labels, text.labels = text.counted, text.labels, None
    if labels is not None and labels.shape == ids.shape[:2]:
        is_asked = (labels != -100).cumsum(-1) == 0
        text.prompt = is_asked if text.counted is None else is_asked & text.counted
    if text.reads_first_pass:
        if cache is not None:
            raise ValueError("routers of this model read a first pass of the whole text: use_cache=False")
        text.is_first_pass = True
        with torch.no_grad():
            text.hidden = decoder(*args, **{**kwargs, "use_cache": False}).last_hidden_state
        text.is_first_pass = False


class RoutedLinear(nn.Module):
    """y = base_layer(x) + s B K_t A x."""

    def __init__(self, base_layer: nn.Module, spec: dict[str, Any], text: Text) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.mixture = Mixture(spec, text)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        return y if self.mixture.text.is_first_pass else y + self.mixture(x).to(y.dtype)


class RoutedMLP(nn.Module):
    """y = sum_e g_e W2_e (act(W1_e x) * W3_e x), W_e = W + s B_e A_e: a token runs the experts it uses, in turn."""

    def __init__(self, mlp: Any, text: Text) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.act_fn, self.text = mlp.act_fn, text

    def forward(self, x: Tensor) -> Tensor:
        if self.text.is_first_pass:
            return self.expert(x)
        parts = [part.mixture for part in self.children() if isinstance(part, RoutedLinear)]
        gates = next(part for part in parts if part.spec["gates"]["down"]["owns_router"]).gate("down", x, None)
        values, experts = gates.topk(int((gates > 0).sum(-1).max()), -1)
        y = torch.zeros(1, device=x.device)
        for value, expert in zip(values.unbind(-1), experts.unbind(-1), strict=True):
            self.text.expert = F.one_hot(expert, gates.shape[-1]).float()
            y = y + value.unsqueeze(-1) * self.expert(x)
        self.text.expert = None
        return y.to(x.dtype)

    def expert(self, x: Tensor) -> Tensor:
        """Run the MLP with the experts that `text` names."""
        y: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return y


class Mixture(nn.Module):
    """s B K_t A x of one linear.

    Tensors, those that the method has: down (Q + shared + router rows, D), up (O, P + shared), core, and for each role
    of a gate (down, up, core, rank) router_, bias_, out_, select_bias_ and given_ (scores that a task adds).
    """

    down: Tensor
    up: Tensor
    core: Tensor

    def __init__(self, spec: dict[str, Any], text: Text) -> None:
        super().__init__()
        self.spec, self.text = spec, text
        self.is_of_whole_mlps: bool = spec["whole_mlps"]
        for name, shape in spec["tensors"].items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape), requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        u = F.linear(x, self.down.to(x.dtype)).float()
        v = self.mixed(x, u)
        return F.linear((self.spec["scaling"] * v).to(x.dtype), self.up.to(x.dtype))

    def mixed(self, x: Tensor, u_ext: Tensor) -> Tensor:
        """Return v = K_t u, (T, P + shared)."""
        spec = self.spec
        num_down, num_shared = sum(spec["ranks_down"]), spec["shared"]
        u = u_ext[..., :num_down]
        if spec["pairing"] == "tied":
            v = self.paired(u, self.text.expert if self.is_of_whole_mlps else self.gate("down", x, u_ext))
        else:
            rank = self.gate("rank", x, u_ext, u)
            z = u if rank is None else rank * u
            down = self.gate("down", x, u_ext)
            if down is not None:
                z = (down.unsqueeze(-1) * z.unflatten(-1, (len(spec["ranks_down"]), -1))).sum(-2)
            z = self.cored(z, self.gate("core", x, u_ext, z))
            up = self.gate("up", x, u_ext, z)
            v = z if up is None else (up.unsqueeze(-1) * z.unsqueeze(-2)).flatten(-2)
        if num_shared:
            v = torch.cat([v, spec["shared_scaling"] * u_ext[..., num_down : num_down + num_shared]], -1)
        return v

    def paired(self, u: Tensor, gate: Tensor | None) -> Tensor:
        """Weigh every pair's own ranks."""
        if gate is None:
            return u
        ranks = torch.tensor(self.spec["ranks_down"], device=u.device)
        return gate.repeat_interleave(ranks, -1) * u

    def cored(self, z: Tensor, gate: Tensor | None) -> Tensor:
        """Apply what lies between the banks: a dense core (R, R), a gated bank (E, R, R) or of diagonals (E, R)."""
        kind = self.spec["core"]
        if kind == "none":
            return z
        if kind == "dense":
            return F.linear(z, self.core)
        if kind == "diagonal":
            return z * (self.core[0] if gate is None else gate @ self.core)
        each = torch.einsum("...r,ers->...es", z, self.core)
        return each[..., 0, :] if gate is None else (gate.unsqueeze(-1) * each).sum(-2)

    def gate(self, role: str, x: Tensor, u_ext: Tensor | None, z: Tensor | None = None) -> Any:
        """Return the weights of a role's experts, (T, E), or None where they are all 1."""
        if role not in self.spec["gates"]:
            return None
        gate = self.spec["gates"][role]
        shared = gate["shared_as"]
        if shared and not gate["owns_router"]:
            scores = self.text.scores[shared]
        else:
            scores = self.scores(role, gate, x, u_ext, z)
        if shared:
            self.text.scores[shared] = scores
        select_bias = getattr(self, f"select_bias_{role}") if gate["select_bias"] else None
        return weights(gate, scores, select_bias)

    def scores(self, role: str, gate: dict[str, Any], x: Tensor, u_ext: Any, z: Any) -> Tensor:
        """Return a router's scores, (T, E), or (E,) where they are the same for all tokens."""
        if gate["input"] == "given":
            given: Tensor = getattr(self, f"given_{role}")
            return given
        if gate["score"] == "activation":
            activations: Tensor = z
            return activations
        if gate["rows"]:  # the router's product stands in u
            scores: Tensor = u_ext[..., gate["rows"][0] : gate["rows"][1]]
        else:
            read = {"z": z, "hidden": self.text.hidden}.get(gate["input"], x)
            scores = F.linear(read.float(), getattr(self, f"router_{role}"))
        if gate["granularity"] != "token":
            scores = self.text.averaged(scores, gate["scores_as"], gate["granularity"])
        if f"bias_{role}" in self.spec["tensors"]:
            scores = scores + getattr(self, f"bias_{role}")
        if gate["score"] == "mlp":
            scores = F.linear(scores.relu(), getattr(self, f"out_{role}"))
        if gate["score"] == "prototype":
            scores = scores.abs()
        if gate["score"] == "noisy":
            scores = scores.chunk(2, -1)[0]
        if f"given_{role}" in self.spec["tensors"]:
            scores = scores + getattr(self, f"given_{role}")
        return scores


def weights(gate: dict[str, Any], scores: Tensor, select_bias: Tensor | None) -> Tensor:
    """Turn scores (T, E) into gates: which experts a token uses, times how much each counts."""
    temperature = gate["temperature"]
    ranked = scores if select_bias is None else scores + select_bias
    if gate["score"] == "activation":
        norm = scores.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
        probs, ranked = (scores.abs() / norm / temperature).softmax(-1), ranked.abs()
    else:
        probs = (scores / temperature).softmax(-1)
    used = selected(gate, probs, ranked)
    kind = gate["weight"]
    if kind == "softmax":
        return probs * used
    if kind == "renorm":
        kept = probs * used
        return kept / kept.sum(-1, keepdim=True)
    if kind == "bounded":
        return 1 + 0.2 * scores.tanh()
    if kind == "sigmoid":
        return scores.sigmoid() * used
    return used if kind == "one" else gate["omega"] * used  # uniform, and straight_through without its gradient


def selected(gate: dict[str, Any], probs: Tensor, ranked: Tensor) -> Tensor:
    """Return 1 where a token uses an expert, else 0."""
    kind = gate["select"]
    if kind == "all":
        return torch.ones_like(probs)
    if kind == "top_p":
        return likeliest(probs, gate["top_p"], 1, inclusive=True)
    if kind == "entropy":  # a few of the likeliest, or all where the router is unsure
        few = likeliest(probs, gate["top_p"], gate["top_k"] or 1, inclusive=False)
        unsure = tsallis_entropy(probs, gate["entropy_order"]) > gate["entropy_limit"]
        return torch.where(unsure.unsqueeze(-1), torch.ones_like(few), few)
    num = 1 if kind == "switch" else min(gate["top_k"], probs.shape[-1])
    return torch.zeros_like(probs).scatter_(-1, ranked.topk(num, -1).indices, 1.0)


def likeliest(probs: Tensor, limit: float, least: int, *, inclusive: bool) -> Tensor:
    """Keep the likeliest experts within a summed probability; `inclusive`: and the one that crosses it."""
    if limit >= 1:
        return torch.ones_like(probs)
    ordered, places = probs.sort(-1, descending=True)
    summed = ordered.cumsum(-1)
    keep = (summed - ordered < limit) if inclusive else (summed <= limit)
    keep[..., :least] = True
    return torch.zeros_like(probs).scatter_(-1, places, keep.to(probs.dtype))


def tsallis_entropy(probs: Tensor, order: float) -> Tensor:
    """Return the entropy of each token's gates in [0, 1]; order 1 is Shannon's."""
    num = probs.shape[-1]
    if order == 1:
        return -(probs * (probs + EPS).log()).sum(-1) / math.log(num)
    value = (1 - ((probs + EPS) ** order).sum(-1)) / (order - 1)
    return value / ((1 - num ** (1 - order)) / (order - 1))


AUTO_MAP = {
    "AutoConfig": "modeling_mixture.MixtureLlamaConfig",
    "AutoModelForCausalLM": "modeling_mixture.MixtureLlamaForCausalLM",
}
"""What config.json says of this file, so that transformers finds it."""

__all__ = ["AUTO_MAP", "MixtureLlamaConfig", "MixtureLlamaForCausalLM"]
