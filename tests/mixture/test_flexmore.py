"""FlexMoRE against FlexOlmo's own layer of transformers, with experts made as its repository makes them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checked_mlps import HIDDEN, LINEARS, WIDE, Mlp, inputs, layer, make, tensors
from safetensors.torch import save_file
from torch import Tensor
from transformers.models.flex_olmo.configuration_flex_olmo import FlexOlmoConfig
from transformers.models.flex_olmo.modeling_flex_olmo import FlexOlmoSparseMoeBlock

from qd2mora.composition.extract import truncated
from qd2mora.mixture import MixtureConfig, load_experts, mixture_layers
from qd2mora.mixture.trained_loras import TrainedLora
from qd2mora.recipe import Adapter

RANKS = (2, 5)


def flexmore(top_k: int | None = None) -> MixtureConfig:
    gates = {"down": {"select": "top_k", "top_k": top_k}} if top_k else None
    return MixtureConfig(
        method="flexmore",
        ranks=[0, *RANKS],
        alpha=3.0,
        gates=gates,
        penalties={"z_loss": 0.0},
        target_modules=list(LINEARS),
    )


def published(model: torch.nn.Module, weights: dict[str, list[Tensor]], top_k: int) -> FlexOlmoSparseMoeBlock:
    """Return the public layer of these experts' whole weights, with our router."""
    config = FlexOlmoConfig(
        hidden_size=HIDDEN, intermediate_size=WIDE, num_experts=1 + len(RANKS), num_experts_per_tok=top_k
    )
    block = FlexOlmoSparseMoeBlock(config).double()
    block.gate.weight.data = tensors(model)["gate_proj.mixture_router_down"].detach().clone()
    both = [torch.cat(pair) for pair in zip(weights["gate_proj"], weights["up_proj"], strict=True)]
    block.experts.gate_up_proj.data, block.experts.down_proj.data = torch.stack(both), torch.stack(weights["down_proj"])
    return block


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_extracted_experts_beside_the_base_are_the_public_layer_in_output_and_gradients(top_k: int) -> None:
    """Experts are whole MLPs; each linear's difference from the base is cut to the expert's rank by its SVD."""
    base, x = Mlp().double(), inputs()
    model = make(flexmore(top_k if top_k < 3 else None), base)
    weights, loras = {}, [dict[str, tuple[Tensor, Tensor]]() for _ in RANKS]
    for name in LINEARS:
        public = layer(model, name).get_base_layer().weight.detach()
        weights[name] = [public]
        for lora, rank in zip(loras, RANKS, strict=True):
            tuned = public + torch.randn_like(public)
            u, s, vh = torch.linalg.svd(tuned - public, full_matrices=False)
            weights[name].append(public + (u[:, :rank] * s[:rank]) @ vh[:rank])
            lora[f"mlp.{name}"] = truncated(tuned - public, rank)
    given = [TrainedLora(None, rank, 1.0, pairs) for rank, pairs in zip(RANKS, loras, strict=True)]
    load_experts(mixture_layers(model), given)
    block = published(model, weights, top_k)
    ours, wanted = model(x), block(x)
    # The public router rounds its gates to float32.
    torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-6)
    router = tensors(model)["gate_proj.mixture_router_down"]
    mine = torch.autograd.grad(ours.square().sum(), [router, x])
    theirs = torch.autograd.grad(wanted.square().sum(), [block.gate.weight, x])
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


def test_a_fresh_one_is_its_base_whatever_the_router() -> None:
    base, x = Mlp().double(), inputs()
    wanted = base(x)
    model = make(flexmore(), base)
    for name, tensor in tensors(model).items():
        if name.endswith("mixture_B"):
            tensor.data.zero_()
    assert torch.equal(model(x), wanted)


def test_loras_that_are_given_stand_beside_the_base_and_may_stay_as_they_are(tmp_path: Path) -> None:
    for rank in RANKS:
        folder = tmp_path / str(rank)
        folder.mkdir()
        told = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(LINEARS)}
        (folder / "adapter_config.json").write_text(json.dumps(told), encoding="utf-8")
        pairs = {}
        for name, linear in Mlp().named_children():
            pairs[f"base_model.model.mlp.{name}.lora_A.weight"] = torch.randn(rank, linear.in_features)
            pairs[f"base_model.model.mlp.{name}.lora_B.weight"] = torch.randn(linear.out_features, rank)
        save_file(pairs, folder / "adapter_model.safetensors")
    folders = [str(tmp_path / str(rank)) for rank in RANKS]
    config = MixtureConfig.from_recipe(Adapter(method="flexmore", adapters=folders, train_experts=False), 1)
    assert config.ranks == [0, *RANKS] and config.num_down == config.num_up == 3
    trained = [
        name for name, tensor in make(replace(config, task_type=None)).named_parameters() if tensor.requires_grad
    ]
    assert len(trained) == 1 and "mixture_router_down" in trained[0]
