"""MLPs under a mixture of experts, and the float64 loop over tokens and experts that they are checked against."""

import torch
from peft import PeftModel, get_peft_model
from reference import softmax
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from qd2mora.base import dense_weight
from qd2mora.mixture import MixtureConfig, mixture_layers

HIDDEN, WIDE, RANK, ALPHA = 12, 20, 3, 5.0
LINEARS = ("gate_proj", "up_proj", "down_proj")
SHAPE = (2, 5)
NO_BALANCE = {"lb_mixtral": 0.0}


class Mlp(nn.Module):
    """LLaMA's MLP in small."""

    def __init__(self, bias: bool = False, wide: int = WIDE) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(HIDDEN, wide, bias=bias) for _ in range(2))
        self.down_proj = nn.Linear(wide, HIDDEN, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Decoder(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.mlp(x)


def config(experts: int = 4, top_k: int = 2, method: str = "mixlora", **changes: object) -> MixtureConfig:
    count = {"experts": experts}
    settings: dict[str, object] = {"rank": RANK, "alpha": ALPHA, "down": count, "up": count}
    settings["target_modules"] = list(LINEARS)
    if method == "mixlora":
        settings["gates"] = {"down": {"top_k": top_k}}
    return MixtureConfig(method=method, **(settings | changes))


def wake(model: nn.Module, std: float = 0.5) -> None:
    torch.manual_seed(1)
    for name, tensor in model.named_parameters():
        if "mixture_" in name:
            nn.init.normal_(tensor, std=std)


def make(mixture: MixtureConfig, mlp: nn.Module | None = None, dtype: torch.dtype = torch.float64) -> PeftModel:
    """A model whose every tensor is random, so that routing matters."""
    torch.manual_seed(0)
    model = get_peft_model(Decoder(mlp or Mlp()), mixture)
    wake(model)
    return model.to(dtype).eval()


def layer(model: nn.Module, linear: str):
    return mixture_layers(model)[f"mlp.{linear}"]


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {f"{linear}.{name}": t for linear in LINEARS for name, t in layer(model, linear).tensors("default").items()}


def inputs(dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(*SHAPE, HIDDEN, dtype=dtype, requires_grad=True)


def gates_of(logits: Tensor, top_k: int, weight: str) -> Tensor:
    """The gates of one token, by the words of the method table."""
    p = softmax(logits)
    chosen = torch.zeros_like(p)
    chosen[logits.argsort(descending=True)[:top_k]] = 1
    return {
        "renorm": p * chosen / (p * chosen).sum(),
        "softmax": p * chosen,
        "one": chosen,
        "sigmoid": logits.sigmoid() * chosen,
        "uniform": chosen,
        "straight_through": chosen.detach() + p - p.detach(),
    }[weight]


def expert_linear(model: nn.Module, copies: dict[str, Tensor], linear: str, expert: int, x: Tensor) -> Tensor:
    """W_e x = W x + b + s B_e A_e x."""
    base = layer(model, linear).get_base_layer()
    bias = 0 if base.bias is None else base.bias.double()
    down, up = (copies[f"{linear}.mixture_{bank}"][expert] for bank in "AB")
    return dense_weight(base).double() @ x + bias + ALPHA / RANK * (up @ (down @ x))


def looped(model: nn.Module, x: Tensor, copies: dict[str, Tensor], top_k: int, weight: str = "renorm") -> Tensor:
    """y = sum_e g_e W2_e (silu(W1_e x) * W3_e x), over every expert of every token."""
    rows = []
    for token in x.reshape(-1, HIDDEN):
        gates = gates_of(copies["gate_proj.mixture_router_down"] @ token, top_k, weight)
        total = 0
        for expert, gate in enumerate(gates):
            first, second = (expert_linear(model, copies, name, expert, token) for name in LINEARS[:2])
            total = total + gate * expert_linear(model, copies, "down_proj", expert, F.silu(first) * second)
        rows.append(total)
    return torch.stack(rows).view(x.shape)


def mixed_by_linear(model: nn.Module, x: Tensor, copies: dict[str, Tensor], top_k: int) -> Tensor:
    """The same gates, applied to each linear's update instead."""
    rows = []
    for token in x.reshape(-1, HIDDEN):
        gates = gates_of(copies["gate_proj.mixture_router_down"] @ token, top_k, "renorm")

        def mixed(linear: str, value: Tensor, gates: Tensor = gates) -> Tensor:
            return sum(gate * expert_linear(model, copies, linear, e, value) for e, gate in enumerate(gates))

        rows.append(mixed("down_proj", F.silu(mixed("gate_proj", token)) * mixed("up_proj", token)))
    return torch.stack(rows).view(x.shape)


def check_against_loop(model: nn.Module, top_k: int, weight: str = "renorm", tolerance: float = 1e-12) -> None:
    """Output and the gradient of every tensor and of x."""
    named, x = tensors(model), inputs(next(iter(tensors(model).values())).dtype)
    y = model(x)
    dy = torch.randn(y.shape, dtype=torch.float64)
    x64 = x.detach().double().requires_grad_()
    copies = {name: tensor.detach().double().requires_grad_() for name, tensor in named.items()}
    wanted = looped(model, x64, copies, top_k, weight)
    assert (y.double() - wanted).norm() <= tolerance * wanted.norm()
    ours = torch.autograd.grad(y, [*named.values(), x], dy.to(y.dtype), allow_unused=True)
    theirs = torch.autograd.grad(wanted, [*copies.values(), x64], dy, allow_unused=True)
    for name, mine, other in zip([*named, "x"], ours, theirs, strict=True):
        if name.endswith("router_down") and weight in ("one", "uniform"):
            assert other is None and (mine is None or not mine.any())
            continue
        if top_k == 1 and name.endswith("router_down") and weight == "renorm":
            assert mine.norm() <= tolerance and other.norm() <= tolerance
            continue
        assert other.norm() > 0, name
        assert (mine.double() - other).norm() <= 10 * tolerance * other.norm(), name
