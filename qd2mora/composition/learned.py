"""CAT with learned weights (LoRA Soups, arXiv 2410.13025): one number for each LoRA and linear, nothing else learns.

W + sum_i w_i s_i B_i A_i, w free, from the given weights on, by Adam on calibration rows. The paper's softmax over the
LoRAs of a linear is a part of that: it can neither grow the sum nor turn a LoRA against another. What comes out is the
best on the calibration rows of what was looked at, the given weights among it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qd2mora.base import load_base, load_tokenizer
from qd2mora.base.passes import device_of, label_states, labels_of, output_head, token_losses
from qd2mora.composition.beside import beside
from qd2mora.composition.calibration import ROWS, parts_of, sampled
from qd2mora.composition.inputs import all_linears, check_base
from qd2mora.data import Row, collate
from qd2mora.memory.checkpointing import enable_checkpointing
from qd2mora.mixture.trained_loras import TrainedLora
from qd2mora.recipe import Recipe

LEARNING_RATE = 0.02
LOOKS = 5
"""How often the loss over all calibration rows is looked at after the start."""


@dataclass(frozen=True)
class Learned:
    """Weights by linear, one for each LoRA; the calibration loss a token with those given and with these; the rows."""

    weights: dict[str, list[float]]
    loss_given: float
    loss: float
    rows: int


def learn(loras: Sequence[TrainedLora], given: Sequence[float], base: str, recipe: Recipe, steps: int) -> Learned:
    """Learn weights on rows of a recipe, on its base. Raises InputRefused where that is not the LoRAs' `base`."""
    check_base("--learn", recipe, base)
    model, pad, rows = _prepared(recipe)
    weights = {name: nn.Parameter(torch.tensor(given, device=device_of(model))) for name in all_linears(loras)}
    with beside(model, loras, weights):
        batches = [
            {key: tensor.to(device_of(model)) for key, tensor in collate(part, pad).items()} for part in parts_of(rows)
        ]
        # Few rows and many weights: what is returned is the best that was looked at, never what the last step left.
        best = {name: list(given) for name in weights}
        loss_given = best_loss = _mean_loss(model, batches)
        optimizer = torch.optim.Adam(weights.values(), lr=LEARNING_RATE)
        for step in range(1, steps + 1):
            _step(model, optimizer, batches[(step - 1) % len(batches)])
            if step == steps or step % max(1, steps // LOOKS) == 0:
                loss = _mean_loss(model, batches)
                if loss < best_loss:
                    best, best_loss = {name: each.tolist() for name, each in weights.items()}, loss
    return Learned(best, loss_given, best_loss, len(rows))


def _prepared(recipe: Recipe) -> tuple[Any, int, list[Row]]:
    """Return the frozen base, its padding token, and calibration rows in random order."""
    model, tokenizer = load_base(recipe.base), load_tokenizer(recipe.base.model)
    enable_checkpointing(model)
    return model, int(tokenizer.pad_token_id), sampled(recipe, tokenizer, ROWS)


def _step(model: Any, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> None:
    model.train()  # transformers recomputes activations in this mode alone
    _losses(model, batch).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    model.eval()


def _mean_loss(model: Any, batches: list[dict[str, Tensor]]) -> float:
    with torch.no_grad():
        return float(torch.cat([_losses(model, batch) for batch in batches]).double().mean())


def _losses(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return the loss of every labelled token, (tokens,)."""
    return token_losses(label_states(model, batch), labels_of(batch), output_head(model))


__all__ = ["LEARNING_RATE", "Learned", "learn"]
