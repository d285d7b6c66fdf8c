"""MixLoRA's experts as DoRAs against the published arithmetic in float64, and what they are in a whole model."""

from dataclasses import replace
from pathlib import Path

import checked_mlps as mlps
import pytest
import torch
from peft import PeftModel, get_peft_model
from test_block_model import IDS, base, config, logits, wake
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from qd2mora.base import dense_weight, load_base
from qd2mora.disk.untrusted import check_adapter
from qd2mora.errors import InputRefused
from qd2mora.mixture import MixtureConfig, mixture_layers
from qd2mora.recipe import Base

EXACT = {"rtol": 1e-9, "atol": 1e-11}


def doras(**changes: object) -> MixtureConfig:
    return replace(mlps.config(penalties=mlps.NO_BALANCE, **changes), experts="dora")


def published(model: nn.Module, copies: dict[str, Tensor], linear: str, expert: int, x: Tensor) -> Tensor:
    """mLoRA's `apply_dora`: m / |W + s B A|_row, detached, times the base's output and the LoRA's."""
    inner = mlps.layer(model, linear).get_base_layer()
    W = dense_weight(inner).double()
    down, up = (copies[f"{linear}.mixture_{bank}"][expert] for bank in "AB")
    scaling = mlps.ALPHA / mlps.RANK
    norm = torch.linalg.norm(W + scaling * (up @ down), dim=1).detach()
    scale = copies[f"{linear}.mixture_magnitude"][expert] / norm
    bias = 0 if inner.bias is None else inner.bias.double()
    return scale * (W @ x + bias) + scale * (scaling * (up @ (down @ x)))


def looped(model: nn.Module, x: Tensor, copies: dict[str, Tensor], top_k: int) -> Tensor:
    rows = []
    for token in x.reshape(-1, mlps.HIDDEN):
        gates = mlps.gates_of(copies["gate_proj.mixture_router_down"] @ token, top_k, "renorm")
        total = 0
        for expert, gate in enumerate(gates):
            first, second = (published(model, copies, name, expert, token) for name in mlps.LINEARS[:2])
            total = total + gate * published(model, copies, "down_proj", expert, F.silu(first) * second)
        rows.append(total)
    return torch.stack(rows).view(x.shape)


@pytest.mark.parametrize(("bias", "changes"), [(False, {}), (True, {}), (False, {"ranks": [1, 2, 3, 3]})])
def test_experts_are_the_published_doras_in_output_and_gradients(bias: bool, changes: dict[str, object]) -> None:
    model = mlps.make(doras(**changes), mlps.Mlp(bias=bias))
    x, named = mlps.inputs(), mlps.tensors(model)
    copies = {name: tensor.detach().clone().requires_grad_() for name, tensor in named.items()}
    x_too = x.detach().clone().requires_grad_()
    y = model(x)
    wanted = looped(model, x_too, by_expert(copies, changes), 2)
    torch.testing.assert_close(y, wanted, **EXACT)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    ours = torch.autograd.grad(y, [*named.values(), x], dy)
    theirs = torch.autograd.grad(wanted, [*copies.values(), x_too], dy)
    for name, mine, other in zip([*named, "x"], ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, msg=lambda text, name=name: f"{name}: {text}", **EXACT)
    assert all(grad.abs().max() > 1e-6 for name, grad in zip(named, ours[:-1], strict=True) if "magnitude" in name)


def by_expert(copies: dict[str, Tensor], changes: dict[str, object]) -> dict[str, Tensor]:
    """Banks of differing ranks, expert by expert."""
    ranks = changes.get("ranks")
    if ranks is None:
        return copies
    cut = dict(copies)
    for name, tensor in copies.items():
        if name.endswith(("_A", "_B")):
            cut[name] = tensor.split(ranks, 0 if name.endswith("_A") else -1)
    return cut


def test_equal_experts_are_one_dora_and_a_magnitude_undoes_the_size_of_its_update() -> None:
    """The published formula is blind to how large W + s B A is: twice the weight, with the same m, is the same."""
    model = mlps.make(doras())
    for linear in mlps.LINEARS:
        for name, tensor in mlps.layer(model, linear).tensors("default").items():
            if "router" not in name:
                tensor.data.copy_(tensor.data[:1].clone().expand_as(tensor))
    x = mlps.inputs()
    before = model(x)
    copies = mlps.tensors(model)
    one = [published(model, copies, name, 0, x[0, 0]) for name in mlps.LINEARS[:2]]
    torch.testing.assert_close(before[0, 0], published(model, copies, "down_proj", 0, F.silu(one[0]) * one[1]), **EXACT)
    for linear in mlps.LINEARS:
        layer = mlps.layer(model, linear)
        layer.get_base_layer().weight.data *= 2
        layer.tensors("default")["mixture_B"].data *= 2
    torch.testing.assert_close(model(x), before, **EXACT)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_fresh_adapter_is_its_base_to_the_bit_in_attention_and_mlps(quantization: str) -> None:
    plain = load_base(Base(model="random:tiny", quantization=quantization))
    wanted = logits(plain)
    model = get_peft_model(plain, config(experts="dora")).eval()
    assert torch.equal(logits(model), wanted)
    kinds = {
        name.rpartition(".")[2]
        for name, each in mixture_layers(model).items()
        if "mixture_magnitude" in each.tensors("default")
    }
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    wake(model)
    assert not torch.allclose(logits(model), wanted, atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(logits(model), wanted)


def test_a_saved_adapter_answers_alike_and_its_configuration_is_trusted(tmp_path: Path) -> None:
    model = get_peft_model(base(), config(experts="dora")).eval()
    wake(model)
    model.save_pretrained(tmp_path)
    check_adapter(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path).eval()
    assert torch.equal(logits(again), logits(model))
    plain = config().to_dict()
    assert "experts" not in plain  # as adapters from before it have it


def test_decoding_from_a_cache_equals_one_pass() -> None:
    model = get_peft_model(base(), config(experts="dora")).eval()
    wake(model)
    whole, cache, pieces = logits(model), None, []
    for start, stop in ((0, 5), *((place, place + 1) for place in range(5, 12))):
        with torch.no_grad():
            out = model(IDS[:, start:stop], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "mola"}, "those of mola share one; mixlora's are whole MLPs"),
        ({"experts": "lora"}, "unknown 'lora'; dora, or leave it out"),
        ({"shared": {"rank": 2}}, "no place for adapter.shared"),
    ],
)
def test_magnitudes_have_no_place_elsewhere(changes: dict[str, object], words: str) -> None:
    with pytest.raises(InputRefused, match=words):
        MixtureConfig(**({"method": "mixlora", "experts": "dora"} | changes))
