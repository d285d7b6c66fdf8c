"""The loss over labelled tokens, in chunks: the whole cross-entropy, for less memory."""

import pytest
import torch
from live_bytes import peak_bytes
from planned import adapted, padded_batch, recipe_of
from torch import nn
from torch.nn import functional as F  # noqa: N812

from qd2mora.base import SHAPES
from qd2mora.memory.loss import CHUNK, IGNORE, RowLoss, token_losses

TINY = SHAPES["tiny"]


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


def inputs(num_tokens: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor, nn.Linear]:
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(8, vocab, bias=False).requires_grad_(False)
    states = torch.randn(num_tokens, 8, generator=generator).requires_grad_()
    return states, torch.randint(0, vocab, (num_tokens,), generator=generator), head


@pytest.mark.parametrize("num_tokens", [0, 1, CHUNK, CHUNK + 1, 2 * CHUNK + 77])
def test_chunks_change_neither_loss_nor_gradient(num_tokens: int) -> None:
    states, targets, head = inputs(num_tokens, 33)
    losses = token_losses(states, targets, head)
    (gradient,) = torch.autograd.grad(losses.sum(), states)
    wanted = F.cross_entropy(head(states), targets, reduction="none")
    (wanted_gradient,) = torch.autograd.grad(wanted.sum(), states)
    assert torch.allclose(losses, wanted, rtol=1e-5, atol=1e-6)
    assert torch.allclose(gradient, wanted_gradient, rtol=1e-5, atol=1e-6)


def test_the_loss_of_many_tokens_takes_the_memory_of_one_chunk() -> None:
    vocab = 1000

    def run(num_tokens: int) -> int:
        states, targets, head = inputs(num_tokens, vocab)
        return peak_bytes(lambda: token_losses(states, targets, head).sum().backward())

    assert run(4 * CHUNK) < 1.1 * run(CHUNK)
