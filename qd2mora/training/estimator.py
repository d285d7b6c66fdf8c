"""The gradient of a router that samples: REINFORCE over several draws of one batch, each judged by the others.

For draws m = 1..n of a row's routing with losses L_m the router gets the gradient of sum_m A_m log P(draw m), A_m how
much worse that draw was than its rivals; experts get the gradient of the mean loss. Losses are measured first, without
gradient, and each draw is repeated from its key: memory stays that of one pass, and the cost is 2n forward and n
backward passes. Two ways to judge:

    rloo   A_m = (L_m - mean of the others) / n, counted as the loss is    ReMix, a reconstruction; arXiv 2402.14740
    grpo   A_m = (L_m - mean) / (std + 1e-4) / n, a mean over rows, of     MoE-GRPO (arXiv 2603.24984), a reconstruction
           each the mean over its tokens

rloo is unbiased for the expected loss. grpo makes every row count alike, however much its draws differ; its reward is
minus the row's loss, whatever the objective, so that with `objective: grpo` a rule's reward is what the loss is weighed
by. One update for each set of draws: the ratio to the router that drew them is 1, and clipping it would do nothing. std
over n - 1 and the 1e-4 beside it are those of the answers' groups (`objectives.grpo`).
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from qd2mora.mixture import Routing
from qd2mora.mixture.draws import mixed
from qd2mora.objectives.grpo import in_deviations

Estimator = Literal["rloo", "grpo"]


def leave_one_out(losses_NB: Tensor) -> Tensor:
    """Return L_m - mean of the others, (N, B), which is n / (n - 1) times L_m - mean; sums to zero over draws."""
    num = losses_NB.shape[0]
    return (losses_NB - losses_NB.mean(0)) * (num / (num - 1))


def backward_over_draws(
    row_losses: Callable[[], Tensor],
    backward: Callable[[Tensor], None],
    routing: Routing,
    share: float,
    num_draws: int,
    estimator: Estimator = "rloo",
) -> Tensor:
    """Add the gradients of experts and routers over several draws; return the mean loss, summed over rows.

    `row_losses` runs the model and returns (B,); `share` is what a row's loss counts in the step (one over its labels).
    """
    keys = routing.rows
    assert keys is not None, "sampled routing needs a key for each row"
    drawn = [tuple(mixed(key, number) for key in keys) for number in range(num_draws)]
    with torch.no_grad():
        losses = torch.stack([_run(row_losses, routing, rows) for rows in drawn])
    # `observer` adds the router's gradient straight to the loss's: scaled here as the loss is scaled there.
    advantages = _judged(losses, routing, share, estimator) * (routing.loss_scale / num_draws)
    for rows, advantage in zip(drawn, advantages, strict=True):
        # A row of several lines is judged as a whole: its lines were drawn together.
        routing.advantage = advantage.repeat_interleave(len(keys) // len(advantage))
        backward(_run(row_losses, routing, rows).sum() * (share / num_draws))
    routing.advantage, routing.rows = None, keys
    return losses.mean(0).sum()


def _judged(losses_NB: Tensor, routing: Routing, share: float, estimator: Estimator) -> Tensor:
    """Return how much worse each draw of a row was, by what that counts in the step, (N, B)."""
    if estimator == "rloo":
        return leave_one_out(losses_NB) * share
    num_rows = losses_NB.shape[1]
    assert routing.lengths is not None
    # log P is a sum over the row's tokens, of all its lines; its rows are a share of the step's.
    tokens = torch.tensor(routing.lengths, device=losses_NB.device).view(num_rows, -1).sum(1)
    return in_deviations(losses_NB) * (routing.share[1] / num_rows / tokens)


def _run(row_losses: Callable[[], Tensor], routing: Routing, rows: tuple[int, ...]) -> Tensor:
    routing.rows = rows
    return row_losses()


__all__ = ["Estimator", "backward_over_draws", "leave_one_out"]
