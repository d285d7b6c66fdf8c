"""The gradient of a router that samples: REINFORCE with a leave-one-out baseline over several draws of one batch.

For draws m = 1..n of a row's routing with losses L_m, the router gets (1/n) sum_m (L_m - mean of the others) grad log
P(draw m), unbiased for the expected loss; experts get the gradient of the mean loss (ReMix, reconstruction; RLOO of
arXiv 2402.14740). Losses are measured first, without gradient, and each draw is repeated from its key: memory stays
that of one pass, and the cost is 2n forward and n backward passes.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from qd2mora.mixture import Routing
from qd2mora.mixture.draws import mixed


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
    advantages = leave_one_out(losses) * (share * routing.loss_scale / num_draws)
    for rows, advantage in zip(drawn, advantages, strict=True):
        # A row of several lines is judged as a whole: its lines were drawn together.
        routing.advantage = advantage.repeat_interleave(len(keys) // len(advantage))
        backward(_run(row_losses, routing, rows).sum() * (share / num_draws))
    routing.advantage, routing.rows = None, keys
    return losses.mean(0).sum()


def _run(row_losses: Callable[[], Tensor], routing: Routing, rows: tuple[int, ...]) -> Tensor:
    routing.rows = rows
    return row_losses()


__all__ = ["backward_over_draws", "leave_one_out"]
