"""Lean norms and gated products: the results of transformers' own, for less that is kept."""

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from qd2mora.base.families import FAMILIES, NormForm
from qd2mora.memory import lean
from qd2mora.memory.lean import gated, make_lean

SHAPE, WIDTH = (3, 5, 24), 24
CONFIG = LlamaConfig(hidden_size=WIDTH, intermediate_size=40, num_attention_heads=2)


def class_of(family: Any, part: str) -> Any:
    return getattr(import_module(family.module), f"{family.prefix}{part}")


def norm_in_float64(x: Tensor, weight: Tensor, form: NormForm) -> Tensor:
    scale = weight.double() + (1.0 if form == "one more than its weight" else 0.0)
    return scale * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def config_of(family: Any) -> Any:
    config = import_module(family.module.replace("modeling", "configuration"))
    kind = getattr(config, f"{family.prefix}TextConfig", None) or getattr(config, f"{family.prefix}Config")
    return kind(hidden_size=WIDTH, intermediate_size=40, num_attention_heads=2, pad_token_id=0)


def pair(kind: Any, dtype: torch.dtype, *arguments: Any) -> tuple[nn.Module, nn.Module]:
    """Return a frozen module of random weights as transformers has it, and a lean one of the same."""
    plain, ours = (kind(*arguments).to(dtype).requires_grad_(False) for _ in range(2))
    for tensor in plain.parameters():
        nn.init.normal_(tensor, std=0.3, generator=torch.Generator().manual_seed(tensor.numel()))
    ours.load_state_dict(plain.state_dict())
    make_lean(ours)
    assert type(ours) is not kind and isinstance(ours, kind)
    return plain, ours


def numbers(seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(module: Any, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = module(x)
    (dx,) = torch.autograd.grad(y, x, dy.to(y.dtype))
    return y.detach(), dx


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
@pytest.mark.parametrize("at_once", [1 << 23, 2 * WIDTH])
def test_a_norm_gives_the_same_bits_and_the_gradient_of_float64(
    family: Any, dtype: torch.dtype, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lean, "AT_ONCE", at_once)
    plain, ours = pair(class_of(family, "RMSNorm"), dtype, WIDTH, 1e-5)
    x, dy = 3 * numbers(1, dtype), numbers(2, dtype)
    before = x.clone(), dy.clone()
    y, dx = run(ours, x, dy)
    assert torch.equal(x, before[0]) and torch.equal(dy, before[1])
    theirs = run(plain, x, dy)
    assert torch.equal(y, theirs[0]) and y.dtype is theirs[0].dtype and dx.dtype is dtype
    x64 = x.double().requires_grad_()
    y64 = norm_in_float64(x64, plain.weight, family.norm)
    (wanted,) = torch.autograd.grad(y64, x64, dy.double())
    off, theirs_off = ((each.double() - wanted).norm() / wanted.norm() for each in (dx, theirs[1]))
    # One rounding, to the dtype; transformers' own has three.
    assert off <= max(1e-6, torch.finfo(dtype).eps) and off <= max(1e-6, 1.1 * theirs_off)


def test_a_norm_of_float32_weights_over_16_bits_gives_float32_as_transformers_does() -> None:
    plain, ours = pair(LlamaRMSNorm, torch.float32, WIDTH)
    x, dy = numbers(1, torch.bfloat16), numbers(2, torch.float32)
    (y, dx), theirs = run(ours, x, dy), run(plain, x, dy)
    assert y.dtype is torch.float32 and torch.equal(y, theirs[0])
    torch.testing.assert_close(dx, theirs[1], rtol=2e-2, atol=1e-2)


def test_a_norm_that_is_trained_gets_its_gradient() -> None:
    plain, ours = pair(LlamaRMSNorm, torch.float32, WIDTH)
    x = numbers(1, torch.float32)
    gradients = []
    for norm in (plain.requires_grad_(), ours.requires_grad_()):
        norm(x).square().sum().backward()
        gradients.append(norm.weight.grad)
    assert torch.equal(*gradients) and gradients[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_an_mlp_gives_the_same_bits_forward_and_backward(family: Any, dtype: torch.dtype) -> None:
    plain, ours = pair(class_of(family, "MLP"), dtype, config_of(family))
    x, dy = numbers(1, dtype), numbers(2, dtype)
    before = dy.clone()
    for mine, theirs in zip(run(ours, x, dy), run(plain, x, dy), strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(dy, before)


def test_another_activation_stays_as_it_is() -> None:
    config = LlamaConfig(hidden_size=WIDTH, intermediate_size=40, num_attention_heads=2, hidden_act="gelu")
    mlp = LlamaMLP(config)
    make_lean(mlp)
    assert type(mlp) is LlamaMLP


def test_gates_in_slots_broadcast_over_an_up_that_has_none() -> None:
    gate, up = torch.randn(2, 3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    y = gated(gate, up)
    assert y.shape == gate.shape
    y.sum().backward()
    assert up.grad is not None and up.grad.shape == up.shape


def test_what_is_kept_is_what_was_read_and_a_factor_a_token() -> None:
    _, norm = pair(LlamaRMSNorm, torch.bfloat16, WIDTH)
    kept: list[Tensor] = []
    x = numbers(1, torch.bfloat16).requires_grad_()
    gate, up = (numbers(seed, torch.bfloat16).requires_grad_() for seed in (2, 3))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        norm(x), gated(gate, up)
    known = {tensor.data_ptr() for tensor in (x, gate, up)}
    (factor,) = (tensor for tensor in kept if tensor.data_ptr() not in known)
    assert factor.dtype is torch.float32 and factor.numel() == 15
    assert len(kept) == 4


def test_making_lean_twice_changes_nothing_and_says_what_it_is() -> None:
    mlp = LlamaMLP(CONFIG)
    assert lean.is_lean(mlp)
    make_lean(mlp)
    kind = type(mlp)
    make_lean(mlp)
    assert type(mlp) is kind and lean.is_lean(mlp)
    assert not lean.is_lean(nn.Linear(2, 2))
