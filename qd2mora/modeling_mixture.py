"""A LLaMA with a routed mixture of LoRA beside its linears, in one file that needs torch and transformers alone.

Exports of a routed adapter carry a copy of this file: AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=
True) loads them anywhere, in 16 bits, or on the 4-bit weights that were trained on. For inference.

Every adapted linear is y = W x + s B K_t A x. It is computed K first: one product u = [A; shared A; routers] x, a step
in rank space v = K_t u, one product B v. K_t is what the gates make of the token; a gate is a row of six fields:
  input        what its router reads: x (the linear's input), z (the code after the down experts), self (the ranks'
               own activations)
  granularity  always `token` here
  scope        module, or block / model: the first linear of the scope scores, the others take its scores
  score        linear, bias, mlp, noisy (noise belongs to training), prototype, activation
  select       all, top_k, top_p, entropy, switch, sample (without noise: the top k)
  weight       softmax, renorm, sigmoid, uniform, one, straight_through, bounded

Shapes: T tokens (any leading axes), D d_in, O d_out, R rank, M down experts, N up experts, E experts, Q all down ranks,
P all up ranks. Rank space is float32.
"""

import math
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
        board: dict[str, Tensor] = {}
        for name, spec in config.mixture.items():
            parent, _, child = name.rpartition(".")
            owner = self.get_submodule(parent)
            setattr(owner, child, RoutedLinear(getattr(owner, child), spec, board))

    def train(self, mode: bool = True) -> "MixtureLlamaForCausalLM":
        """Switch modes; in neither may bitsandbytes 0.50 repack 4-bit weights, which rounds their scales to 16 bits."""
        for module in self.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        return super().train(mode)


class RoutedLinear(nn.Module):
    """y = base_layer(x) + s B K_t A x."""

    def __init__(self, base_layer: nn.Module, spec: dict[str, Any], board: dict[str, Tensor]) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.mixture = Mixture(spec, board)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        return y + self.mixture(x).to(y.dtype)


class Mixture(nn.Module):
    """s B K_t A x of one linear.

    Tensors, those that the method has: down (Q + shared + router rows, D), up (O, P + shared), core, and for each role
    of a gate (down, up, core, rank) router_, bias_, out_, select_bias_ and given_ (scores that a task adds).
    `board` holds the scores of routers that several linears share.
    """

    down: Tensor
    up: Tensor
    core: Tensor

    def __init__(self, spec: dict[str, Any], board: dict[str, Tensor]) -> None:
        super().__init__()
        self.spec, self.board = spec, board
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
            v = self.paired(u, self.gate("down", x, u_ext))
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

    def gate(self, role: str, x: Tensor, u_ext: Tensor, z: Tensor | None = None) -> Tensor | None:
        """Return the weights of a role's experts, (T, E), or None where they are all 1."""
        if role not in self.spec["gates"]:
            return None
        gate = self.spec["gates"][role]
        shared = gate["shared_as"]
        if shared and not gate["owns_router"]:
            scores = self.board[shared]
        else:
            scores = self.scores(role, gate, x, u_ext, z)
        if shared:
            self.board[shared] = scores
        select_bias = getattr(self, f"select_bias_{role}") if gate["select_bias"] else None
        return weights(gate, scores, select_bias)

    def scores(self, role: str, gate: dict[str, Any], x: Tensor, u_ext: Tensor, z: Tensor | None) -> Tensor:
        """Return a router's scores, (T, E)."""
        if gate["score"] == "activation":
            assert z is not None
            return z
        if gate["rows"]:  # the router's product stands in u
            scores = u_ext[..., gate["rows"][0] : gate["rows"][1]]
        else:
            read = z if gate["input"] == "z" else x.float()
            assert read is not None
            scores = F.linear(read, getattr(self, f"router_{role}"))
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
