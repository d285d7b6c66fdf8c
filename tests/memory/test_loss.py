"""The loss over labelled tokens, in chunks: the whole cross-entropy, for less memory."""

from collections.abc import Callable

import pytest
import torch
from live_bytes import peak_bytes
from planned import adapted, padded_batch, recipe_of
from torch import nn
from torch.nn import functional as F  # noqa: N812

from qd2mora.base import SHAPES, random_base
from qd2mora.base.passes import CHUNK, IGNORE, OutputHead, token_losses
from qd2mora.memory.loss import RowLoss
from qd2mora.mixture import MixtureConfig, add_adapter, routing_of
from qd2mora.recipe import Base

TINY = SHAPES["tiny"]
CPU = torch.device("cpu")


def test_row_losses_are_the_cross_entropy_of_the_labelled_tokens() -> None:
    model = adapted(TINY, recipe_of())
    batch = padded_batch(3, 24, TINY.vocab)
    batch["labels"][:, :7] = IGNORE
    batch["labels"][0, -3:] = IGNORE
    batch["labels"][2] = IGNORE
    losses = RowLoss(model)(batch)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    wanted = F.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none").sum(1)
    assert losses.shape == (3,)
    assert losses[2] == 0
    assert torch.allclose(losses, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["d2mora", "loramoe", "mixlora", "hydralora"])
def test_rows_padded_on_the_right_need_no_mask(method: str) -> None:
    """What attention may leave out on a GPU; routers and their penalties still know which tokens are real."""
    config = MixtureConfig(method=method, rank=4, target_modules="all-linear")
    model = add_adapter(random_base(TINY, Base(model="random:tiny", compute_dtype="float32"), CPU), config, seed=0)
    model.train()
    for name, tensor in model.named_parameters():
        if "mixture_B" in name and tensor.requires_grad:
            nn.init.normal_(tensor, std=0.05, generator=torch.Generator().manual_seed(1))
    batch = padded_batch(3, 24, TINY.vocab)
    batch["labels"][batch["attention_mask"] == 0] = IGNORE
    batch["labels"][:, :5] = IGNORE
    batch["group"] = torch.tensor([0, 1, 0])
    results = []
    for given in (batch, batch | {"attended": batch["attention_mask"].bool()}):
        if "attended" in given:
            del given["attention_mask"]
        losses = RowLoss(model)(given)
        losses.sum().backward()
        penalty = sum(routing_of(model).take_values().values(), torch.zeros(()))
        gradients = [tensor.grad for tensor in model.parameters() if tensor.grad is not None]
        results.append([losses.detach(), penalty, *gradients])
        model.zero_grad()
    assert len(results[0]) == len(results[1]) > 10
    for masked, plain in zip(*results, strict=True):
        torch.testing.assert_close(plain, masked, rtol=1e-4, atol=1e-6)


def inputs(num_tokens: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor, nn.Linear]:
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(8, vocab, bias=False).requires_grad_(False)
    states = torch.randn(num_tokens, 8, generator=generator).requires_grad_()
    return states, torch.randint(0, vocab, (num_tokens,), generator=generator), head


@pytest.mark.parametrize("num_tokens", [0, 1, CHUNK, CHUNK + 1, 2 * CHUNK + 77])
def test_chunks_change_neither_loss_nor_gradient(num_tokens: int) -> None:
    states, targets, head = inputs(num_tokens, 33)
    losses = token_losses(states, targets, OutputHead(head))
    (gradient,) = torch.autograd.grad(losses.sum(), states)
    wanted = F.cross_entropy(head(states), targets, reduction="none")
    (wanted_gradient,) = torch.autograd.grad(wanted.sum(), states)
    assert torch.allclose(losses, wanted, rtol=1e-5, atol=1e-6)
    assert torch.allclose(gradient, wanted_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_losses_are_float32_and_exact_up_to_the_rounding_of_logits(
    dtype: torch.dtype, rounding: float, scale: float
) -> None:
    states, targets, head = inputs(50, 33)
    head = head.to(dtype)
    given = (scale * states.detach()).to(dtype).requires_grad_()
    losses = token_losses(given, targets, OutputHead(head), 16)
    weights = torch.linspace(-1, 2, 50)
    (gradient,) = torch.autograd.grad((weights * losses).sum(), given)
    exact = given.detach().double().requires_grad_()
    wanted = F.cross_entropy(F.linear(exact, head.weight.double()), targets, reduction="none")
    (wanted_gradient,) = torch.autograd.grad((weights * wanted).sum(), exact)
    assert losses.dtype is torch.float32 and gradient.dtype is dtype
    size = max(1.0, float(F.linear(exact.detach(), head.weight.double()).abs().max()))
    assert (losses - wanted).abs().max() <= 3 * rounding * size
    if scale == 1.0:  # where logits are large, their rounding decides which of two is the likelier
        assert (gradient - wanted_gradient).norm() <= 8 * rounding * wanted_gradient.norm()


@pytest.mark.parametrize(("divisor", "cap"), [(4.0, None), (1.0, 3.0), (2.5, 1.5)])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_divided_and_capped_logits_give_the_losses_and_gradients_of_float64(
    dtype: torch.dtype, rounding: float, divisor: float, cap: float | None
) -> None:
    states, targets, head = inputs(50, 33)
    head = head.to(dtype)
    given = (4 * states.detach()).to(dtype).requires_grad_()
    weights = torch.linspace(-1, 2, 50)
    exact = given.detach().double().requires_grad_()
    logits = F.linear(exact, head.weight.double()) / divisor
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    wanted = F.cross_entropy(logits, targets, reduction="none")
    (wanted_gradient,) = torch.autograd.grad((weights * wanted).sum(), exact)
    for linear in (head, nn.Sequential(head)):  # the lean way, and that by autograd
        losses = token_losses(given, targets, OutputHead(linear, divisor, cap), 16)
        (gradient,) = torch.autograd.grad((weights * losses).sum(), given)
        assert (losses - wanted).abs().max() <= 30 * rounding
        assert (gradient - wanted_gradient).norm() <= 8 * rounding * wanted_gradient.norm()


@pytest.mark.parametrize("wrap", [lambda head: head.requires_grad_(), lambda head: nn.Sequential(head)])
def test_a_head_that_is_trained_or_wrapped_gets_the_same_loss_and_its_own_gradient(
    wrap: Callable[[nn.Linear], nn.Module],
) -> None:
    states, targets, plain = inputs(40, 33)
    wanted = token_losses(states, targets, OutputHead(plain), 16)
    (wanted_gradient,) = torch.autograd.grad(wanted.sum(), states)
    head = wrap(plain)
    losses = token_losses(states, targets, OutputHead(head), 16)
    losses.sum().backward()
    torch.testing.assert_close(losses, wanted)
    torch.testing.assert_close(states.grad, wanted_gradient)
    if plain.weight.requires_grad:
        (direct,) = torch.autograd.grad(F.cross_entropy(plain(states), targets, reduction="sum"), plain.weight)
        torch.testing.assert_close(plain.weight.grad, direct)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loss_takes_one_chunk_of_logits_and_their_16_bit_form(dtype: torch.dtype) -> None:
    vocab, width, chunk = 4000, 8, 128
    head = nn.Linear(width, vocab, bias=False).to(dtype).requires_grad_(False)

    def run(num_tokens: int, is_training: bool) -> float:
        states = torch.zeros(num_tokens, width, dtype=dtype, requires_grad=is_training)
        targets = torch.zeros(num_tokens, dtype=torch.long)

        def both() -> None:
            losses = token_losses(states, targets, OutputHead(head), chunk)
            if is_training:
                losses.sum().backward()

        return peak_bytes(both)

    logits = chunk * vocab * (4 if dtype is torch.float32 else 6)
    for is_training in (True, False):
        assert logits <= run(4 * chunk, is_training) < 1.05 * logits
