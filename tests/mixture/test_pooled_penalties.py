"""Penalties of whole models, pooled over routers or added up, written anew from code and papers; their gradients."""

from collections.abc import Callable

import pytest
import reference_gates as gates
import torch
from peft import get_peft_model
from test_block_model import IDS
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from qd2mora.mixture import MixtureConfig, mixture_layers
from qd2mora.mixture.balance import POOLABLE
from qd2mora.mixture.presets import METHODS

# Two layers, GQA, so that linears of a layer differ in size and their routers do not.
SHAPE = LlamaConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
)
MASK = torch.ones_like(IDS)
MASK[1, 4:] = 0
TASKS = torch.tensor([2, 0])


def adapted(method: str, **changes: object) -> nn.Module:
    torch.manual_seed(0)
    model = LlamaForCausalLM(SHAPE).double()
    targets = list(METHODS[method].targets)
    config = MixtureConfig(method=method, rank=2, task_type="CAUSAL_LM", target_modules=targets, **changes)
    made = get_peft_model(model, config).double()
    torch.manual_seed(1)
    for layer in mixture_layers(made).values():
        for name, tensor in layer.tensors("default").items():
            if "router" in name:
                nn.init.normal_(tensor, std=0.7)
    return made.train()


def logits_of(model: nn.Module) -> dict[str, Tensor]:
    """Return each router's logits at the tokens that count, (n, E), with their graph."""
    found: dict[str, Tensor] = {}

    def read(name: str, router: Tensor, bias: Tensor | None) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found[name] = (inputs[0].detach() @ router.T + (0.0 if bias is None else bias))[MASK.bool()]

        return hook

    handles = []
    for name, layer in mixture_layers(model).items():
        tensors = layer.tensors("default")
        router = tensors.get("mixture_router_down")
        if router is not None:
            handles.append(layer.register_forward_pre_hook(read(name, router, tensors.get("mixture_bias_down"))))
    model(input_ids=IDS, attention_mask=MASK)
    for handle in handles:
        handle.remove()
    return found


def mixtral(all_logits: Tensor, k: int) -> Tensor:
    """The rule of transformers' Mixtral over the logits of all layers, one after the other."""
    number = all_logits.shape[-1]
    probs = all_logits.softmax(-1)
    used = torch.stack([gates.mask(gates.largest(token, k), number) for token in probs])
    return number * (used.mean(0) * probs.mean(0)).sum()


def dynmole(all_logits: Tensor) -> Tensor:
    """Both losses over the logits of all routers: 1e-2 of the mean entropy, 1e-3 of the masked balance."""
    probs = all_logits.softmax(-1)
    number = probs.shape[-1]
    entropy = (1 - ((probs + 1e-5) ** 1.1).sum(-1)) / 0.1 / ((1 - number**-0.1) / 0.1)
    masked = torch.stack([gates.by_entropy(token, 1.1, 0.9, 0.75, 2) for token in all_logits])
    return 1e-2 * entropy.mean() + 1e-3 * number * (masked.mean(0) * probs.mean(0)).sum()


def mola_of_a_layer(all_logits: Tensor) -> Tensor:
    number = all_logits.shape[-1]
    probs = all_logits.softmax(-1)
    counts = torch.stack([gates.mask(gates.largest(token, 2), number) for token in probs]).sum(0)
    return number * (counts / counts.sum() * probs.mean(0)).sum()


def by_layer(logits: dict[str, Tensor]) -> Tensor:
    """MoLA's: the routers of a layer as one, layers added up, 1e-3."""
    layers = [[each for name, each in logits.items() if f".{number}." in name] for number in range(2)]
    return 1e-3 * sum((mola_of_a_layer(torch.cat(each)) for each in layers), torch.zeros(()))


def llava(logits: dict[str, Tensor]) -> Tensor:
    """Of each row, over its tokens in all layers, without a factor; rows' mean, 1e-2."""
    layers, rows = torch.stack(list(logits.values())), MASK.sum(1).tolist()
    total, start = torch.zeros(()), 0
    for length in rows:
        probs = layers[:, start : start + length].flatten(0, 1).softmax(-1)
        used = torch.stack([gates.mask(gates.largest(token, 1), probs.shape[-1]) for token in probs])
        total = total + (probs.mean(0) * used.mean(0)).sum() / len(rows)
        start += length
    return 1e-2 * total


def lora_mixer(logits: dict[str, Tensor]) -> Tensor:
    """Of each router alpha sum_e f_e mean(p_e) - lambda mean H(p), f the shares of the top 3's choices; added up."""
    total = torch.zeros(())
    for each in logits.values():
        probs = each.softmax(-1)
        used = torch.stack([gates.mask(gates.largest(token, 3), probs.shape[-1]) for token in probs]).sum(0)
        entropy = -(probs * (probs + 1e-5).log()).sum(-1).mean()
        total = total + 1e-2 * (used / used.sum() * probs.mean(0)).sum() - 1e-3 * entropy
    return total


def meteora(logits: dict[str, Tensor]) -> Tensor:
    """Cross entropy of all gates' logits against the number of the row's task, 50 times their mean."""
    owners = TASKS.repeat_interleave(MASK.sum(1))
    losses = [
        torch.stack([-row.log_softmax(-1)[owner] for row, owner in zip(each, owners, strict=True)])
        for each in logits.values()
    ]
    return 50 * torch.cat(losses).mean()


PUBLISHED: dict[str, tuple[dict[str, object], Callable[[dict[str, Tensor]], Tensor]]] = {
    "mixlora": ({}, lambda logits: 1e-3 * mixtral(torch.cat(list(logits.values())), 2)),
    "dynmole": ({}, lambda logits: dynmole(torch.cat(list(logits.values())))),
    "mola": ({"allocation": "3-4"}, by_layer),
    "llava_mole": ({}, llava),
    "meteora": ({}, meteora),
    "lora_mixer": ({}, lora_mixer),
    # Routers among as many experts are one mean each: the published rule knows of one number alone.
    "mixlora of two sizes": (
        {"allocation": "3-4"},
        lambda logits: 1e-3 * sum((mixtral(each, 2) for each in logits.values()), torch.zeros(())),
    ),
}


@pytest.mark.parametrize("method", PUBLISHED)
def test_a_loss_over_all_routers_is_the_published_one_in_value_and_gradient(method: str) -> None:
    changes, published = PUBLISHED[method]
    model = adapted(method.partition(" ")[0], **changes)
    wanted = published(logits_of(model))
    parts = ("mixture_router", "mixture_bias")
    routers = {name: tensor for name, tensor in model.named_parameters() if any(part in name for part in parts)}
    theirs = torch.autograd.grad(wanted, list(routers.values()))
    routing = model.base_model.routing
    routing.forget()
    # Up experts are zero, so that the penalty's gradient is all that routers get.
    (0 * model(input_ids=IDS, attention_mask=MASK, task_index=TASKS).logits).sum().backward()
    assert sum(routing.take_values().values()) == pytest.approx(float(wanted.detach()), rel=1e-9)
    for (name, router), gradient in zip(routers.items(), theirs, strict=True):
        assert gradient.abs().max() > 0
        torch.testing.assert_close(
            router.grad, gradient, rtol=1e-7, atol=1e-12, msg=lambda text, name=name: name + text
        )


def test_what_is_pooled_can_be() -> None:
    pooled = {penalty.kind for row in METHODS.values() for penalty in row.penalties if penalty.pool != "router"}
    assert pooled and pooled <= POOLABLE
