"""Mixtures of whole MLPs in a LLaMA: saving, decoding, recomputing, training, merging, counting."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qd2mora.base import SHAPES, load_base
from qd2mora.errors import InputRefused
from qd2mora.memory.checkpointing import enable_checkpointing
from qd2mora.merging import core_lsq, mean_gate
from qd2mora.merging.fidelity import measure, unexplained
from qd2mora.merging.static_updates import of_cores
from qd2mora.merging.statistics import collect
from qd2mora.mixture import MixtureConfig, add_adapter, mixture_layers
from qd2mora.mixture.method import ALL, MLP
from qd2mora.recipe import Base

IDS = torch.arange(3, 27).view(2, 12)
FOUR = {"experts": 4}


def config(**changes: object) -> MixtureConfig:
    settings: dict[str, object] = {"rank": 4, "alpha": 8, "down": FOUR, "up": FOUR, "target_modules": list(ALL)}
    return MixtureConfig(method="mixlora", task_type="CAUSAL_LM", **(settings | changes))


def base() -> nn.Module:
    return load_base(Base(model="random:tiny"))


def wake(model: nn.Module) -> None:
    torch.manual_seed(0)
    for name, tensor in model.named_parameters():
        if "mixture_" in name:
            nn.init.normal_(tensor, std=0.3)


def woken(**changes: object) -> PeftModel:
    model = get_peft_model(base(), config(**changes)).eval()
    wake(model)
    return model


def logits(model: nn.Module, ids: Tensor = IDS, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


def test_an_adapted_model_starts_as_its_base_and_does_not_stay_so() -> None:
    before, model = logits(base()), get_peft_model(base(), config()).eval()
    assert torch.equal(logits(model), before)
    wake(model)
    assert not torch.allclose(logits(model), before, atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model.unload()), before)


def test_attention_may_have_a_rank_of_its_own_with_alpha_over_it(tmp_path: Path) -> None:
    model = woken(attention_rank=6)
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))
    for name, layer in mixture_layers(model).items():
        A, B = layer.tensors("default")["mixture_A"], layer.tensors("default")["mixture_B"]
        assert A.shape[1] == (6 if "self_attn" in name else 4), name
        if name.endswith("q_proj"):
            wanted = layer.base_layer(x) + 8 / 6 * x @ A[0].T @ B[0].T
            torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-5)
    before = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base(), tmp_path).eval()), before)
    assert "attention_rank" not in config().to_dict()
    with pytest.raises(InputRefused, match="attention_rank: mola has experts in every linear"):
        MixtureConfig(method="mola", attention_rank=6)


def test_saving_and_loading_is_bitwise_under_the_promised_names(tmp_path: Path) -> None:
    model = woken()
    before = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base(), tmp_path).eval()), before)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    prefix = "base_model.model.model.layers.1.mlp."
    assert {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)} == {
        "gate_proj.mixture_A": (4, 4, 64),
        "gate_proj.mixture_B": (4, 192, 4),
        "gate_proj.mixture_router_down": (4, 64),
        "up_proj.mixture_A": (4, 4, 64),
        "up_proj.mixture_B": (4, 192, 4),
        "down_proj.mixture_A": (4, 4, 192),
        "down_proj.mixture_B": (4, 64, 4),
    }


def test_decoding_with_a_cache_equals_one_pass() -> None:
    model = woken()
    whole, cache = logits(model), None
    for position in range(IDS.shape[1]):
        with torch.no_grad():
            out = model(IDS[:, position : position + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        torch.testing.assert_close(out.logits[:, 0], whole[:, position], rtol=1e-4, atol=1e-4)


def test_a_row_answers_the_same_beside_others_and_with_padding() -> None:
    model = woken()
    alone, padded = logits(model, IDS[:1]), torch.cat([torch.full((2, 5), 1), IDS], 1)
    mask = torch.cat([torch.zeros(2, 5), torch.ones(2, 12)], 1).long()
    torch.testing.assert_close(logits(model)[:1], alone, rtol=1e-4, atol=1e-4)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    beside = logits(model, padded, attention_mask=mask, position_ids=positions)[:1, 5:]
    torch.testing.assert_close(beside, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gate", [{"top_k": 2}, {"top_k": 1, "weight": "one"}], ids=["soft", "balance alone"])
@pytest.mark.parametrize("per_expert", [False, True])
def test_recomputing_layers_gives_the_same_gradients_routers_included(gate: dict, per_expert: bool) -> None:
    results, values = [], []
    for recompute in (False, True):
        plain = base()
        model = add_adapter(plain, config(dropout=0.3, dropout_per_expert=per_expert, gates={"down": gate}), seed=0)
        wake(model)
        if recompute:
            enable_checkpointing(plain)
        assert plain.is_gradient_checkpointing is recompute
        model.train()
        torch.manual_seed(3)
        model(input_ids=IDS, labels=IDS).loss.backward()
        results.append({name: tensor.grad for name, tensor in model.named_parameters() if tensor.requires_grad})
        values.append(model.base_model.routing.take_values())
    for name, kept in results[0].items():
        assert kept.any(), name
        assert torch.equal(kept, results[1][name]), name
    # One mean over two MLPs: k at least where routers are balanced, and near that with random tokens.
    assert values[0] == values[1]
    assert 1e-3 * gate["top_k"] * 0.9 < values[0]["lb_mixtral"] < 4e-3


def test_it_learns_every_tensor_of_it() -> None:
    model = add_adapter(base(), config(), seed=0).train()
    named = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    before = {name: tensor.detach().clone() for name, tensor in named.items()}
    optimizer = torch.optim.Adam(named.values(), lr=1e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(later < earlier for earlier, later in pairwise(losses))
    assert losses[-1] < losses[0] - 1
    assert all(not torch.equal(tensor, before[name]) for name, tensor in named.items())


def batch() -> dict[str, Tensor]:
    return {"input_ids": IDS, "labels": IDS, "attention_mask": torch.ones_like(IDS)}


@pytest.mark.parametrize("strategy", [core_lsq, mean_gate])
def test_equal_experts_merge_exactly_in_each_linear_and_end_to_end(strategy) -> None:
    model = woken()
    for name, tensor in model.named_parameters():
        if ".mlp." in name and ("mixture_A" in name or "mixture_B" in name):
            tensor.data.copy_(tensor.data[:1].expand_as(tensor).clone())
    cores = {name: strategy.mixing(moments) for name, moments in collect(model, [batch()]).items()}
    fidelity = measure(model, of_cores(model, cores), [batch()])
    assert abs(fidelity.base - fidelity.routed) > 0.01
    # Gates sum to one, as do their means and what is fitted to them; the rest is float32 sums.
    assert abs(fidelity.kl_per_token) < 1e-6


def test_a_static_stand_in_is_measured_where_the_mixture_is_real() -> None:
    model = woken()
    routed = logits(model)
    moments = collect(model, [batch()])
    layers = mixture_layers(model)
    assert set(moments) == set(layers)
    for name, each in moments.items():
        up = layers[name].columns("default").detach()
        fitted, mean = (unexplained(each, strategy.mixing(each), up) for strategy in (core_lsq, mean_gate))
        assert fitted <= mean + 1e-9
        assert (mean > 0.01) == (".mlp." in name), name
        # A mean of gates that sum to one: as many times the identity's trace.
        assert float(mean_gate.mixing(each).trace()) == pytest.approx(4, rel=1e-5)
    cores = {name: core_lsq.mixing(each) for name, each in moments.items()}
    fidelity = measure(model, of_cores(model, cores), [batch()])
    assert 1e-3 < fidelity.kl_per_token < 10
    assert not model.base_model.routing.slots
    assert torch.equal(logits(model), routed)


def test_what_explains_down_proj_best_is_fitted_to_the_sum_over_slots() -> None:
    """u = A hbar and v = sum_k g_k m_k A h_k, against the two experts' activations themselves."""
    model = woken(target_modules=list(MLP))
    layers = mixture_layers(model)
    gate, _, down = (layers[f"model.layers.0.mlp.{name}"] for name in MLP)
    seen: dict[str, Tensor] = {}

    def before_first(layer: nn.Module, args: tuple[Tensor]) -> None:
        seen["x"] = args[0]

    def before_last(layer: nn.Module, args: tuple[Tensor]) -> None:
        seen["h"] = args[0]
        seen["u"], seen["v"] = down.rank_space(args[0], "default")
        seen["K"] = down.mixing(args[0], "default")

    gate.register_forward_pre_hook(before_first)
    down.register_forward_pre_hook(before_last)
    logits(model)
    p = (seen["x"] @ gate.tensors("default")["mixture_router_down"].T).softmax(-1)
    values, experts = p.topk(2, -1)
    values = values / values.sum(-1, keepdim=True)
    A = down.tensors("default")["mixture_A"].detach()
    wanted, mean = torch.zeros(2, 12, 4, 4), 0
    gates = torch.zeros(2, 12, 4).scatter(-1, experts, values)
    for slot in range(2):
        each = torch.einsum("btrd,btd->btr", A[experts[..., slot]], seen["h"][slot]) * values[..., slot, None]
        wanted.scatter_(2, experts[..., slot, None, None].expand(-1, -1, 1, 4), each.unsqueeze(2))
        mean = mean + values[..., slot, None] * seen["h"][slot]
    torch.testing.assert_close(seen["v"], wanted.flatten(-2), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(seen["u"], mean @ A.flatten(0, 1).T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(seen["K"], torch.diag_embed(gates.repeat_interleave(4, -1)), rtol=1e-4, atol=1e-5)


def test_a_7b_has_as_many_trainable_parameters_as_the_formula_says() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(SHAPES["llama-7b"].config())
    adapted = get_peft_model(model, MixtureConfig(method="mixlora", target_modules=list(ALL)), low_cpu_mem_usage=True)
    attention, mlp, router = 4 * 16 * (4096 + 4096), 8 * 3 * 16 * (4096 + 11008), 8 * 4096
    count = sum(tensor.numel() for tensor in adapted.parameters() if tensor.requires_grad)
    assert count == 32 * (attention + mlp + router) == 203_423_744
