"""What is asked of a step's numbers before they touch the weights, and who is to blame where they will not do.

A step whose loss or gradient norm is not finite is skipped: weights and moments stay, the data moves on, the step is
counted. The first two updates prove that gradients flow where the recipe says and nowhere else.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qd2mora.errors import NotFinite
from qd2mora.mixture import mixture_layers
from qd2mora.training.state import Progress

MAX_BAD_IN_A_ROW = 3
MAX_BAD_SHARE = 0.01
FEWEST_BAD_FOR_SHARE = 10
"""Below so many bad steps their share says nothing."""
LARGEST_SCALE, SMALLEST_SCALE = 2.0**24, 1.0
STEPS_TO_GROW = 2000


def is_too_bad(progress: Progress) -> bool:
    """Tell whether a run has had three bad steps in a row, or one in a hundred."""
    is_often = progress.bad_steps >= FEWEST_BAD_FOR_SHARE and progress.bad_steps > MAX_BAD_SHARE * progress.step
    return progress.bad_in_a_row >= MAX_BAD_IN_A_ROW or is_often


def lower_scale(progress: Progress) -> bool:
    """Halve the loss scale after an overflow of float16 gradients; False where it cannot go lower, or there is none."""
    if progress.loss_scale is None or progress.loss_scale <= SMALLEST_SCALE:
        return False
    progress.loss_scale /= 2
    progress.applied_at_scale = 0
    return True


def raise_scale(progress: Progress) -> None:
    """Count an update; double the loss scale after many without an overflow."""
    if progress.loss_scale is None:
        return
    progress.applied_at_scale += 1
    if progress.applied_at_scale >= STEPS_TO_GROW and progress.loss_scale < LARGEST_SCALE:
        progress.loss_scale *= 2
        progress.applied_at_scale = 0


def prove_flow(model: nn.Module, parameters: dict[str, nn.Parameter], progress: Progress) -> None:
    """Check before update 0 and 1 that gradients are where they should be.

    At update 0 the up experts are zero, so nothing below them has a gradient yet; at update 1 everything has one, and
    the experts' is not zero (float16 may round a small one to zero). Frozen weights never have any.

    Raises NotFinite naming the tensor.
    """
    if progress.applied > 1:
        return
    frozen = [name for name, tensor in model.named_parameters() if not tensor.requires_grad and tensor.grad is not None]
    if frozen:
        raise NotFinite(f"{frozen[0]} is frozen and got a gradient; nothing was updated")
    if progress.applied == 0:
        if not any(_is_moving(tensor) for tensor in parameters.values()):
            raise NotFinite("no trainable tensor got a gradient: the loss does not depend on the adapter")
        return
    banks = {
        id(layer.tensors(name)[bank])
        for layer in mixture_layers(model).values()
        for name in layer.active_adapters
        # A method that grows may begin its next stage at update 1, with an up expert that is zero again.
        if not layer.mixture_config[name].row.stages
        for bank in ("mixture_A", "mixture_B")
    }
    for name, tensor in parameters.items():
        is_still = id(tensor) in banks and progress.loss_scale is None and not _is_moving(tensor)
        if tensor.grad is None or is_still:
            raise NotFinite(f"{name} is to be trained and got no gradient in the first two steps")


def blame(model: nn.Module, parameters: dict[str, nn.Parameter], forward: Callable[[], Any]) -> str:
    """Name the module whose output is the first that is not finite, else the last tensor with such a gradient.

    `forward` runs the model again. Backward runs from the loss down, so the last layer is where trouble began.
    """
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) and output else output
            if isinstance(first, Tensor) and not bool(torch.isfinite(first).all()):
                found.append(name)

        return hook

    named = [(name, module) for name, module in model.named_modules() if name]
    handles = [module.register_forward_hook(look(name)) for name, module in named]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    if found:
        return f"the output of {found[0]}"
    bad = [name for name, tensor in parameters.items() if tensor.grad is not None and not tensor.grad.isfinite().all()]
    return f"the gradient of {bad[-1]}" if bad else "the loss alone"


def _is_moving(tensor: nn.Parameter) -> bool:
    return tensor.grad is not None and bool(tensor.grad.any())


__all__ = ["MAX_BAD_IN_A_ROW", "blame", "is_too_bad", "lower_scale", "prove_flow", "raise_scale"]
