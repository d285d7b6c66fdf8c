"""Sums over the processes of a run. A step adds up its gradients once, when every process has all of its own.

That keeps a step whole: until then any process may say that it ran out of memory, and all do the step again.
"""

import torch
from torch import nn
from torch.distributed import all_reduce


def sum_numbers(numbers: list[torch.Tensor | float], device: torch.device, num_processes: int) -> list[float]:
    """Return each number summed over all processes, in float64."""
    if num_processes == 1:
        return [float(number) for number in numbers]
    total = torch.tensor([float(number) for number in numbers], dtype=torch.float64, device=device)
    all_reduce(total)
    return total.tolist()


def sum_tensor(tensor: torch.Tensor, num_processes: int) -> torch.Tensor:
    """Return a tensor summed over all processes, in place."""
    if num_processes > 1:
        all_reduce(tensor)
    return tensor


def sum_gradients(parameters: dict[str, nn.Parameter], num_processes: int) -> None:
    """Add up the gradients of all processes in place, tensor by tensor in the order of the names."""
    if num_processes == 1:
        return
    for parameter in parameters.values():
        if parameter.grad is None:  # this process's rows may not have touched it
            parameter.grad = torch.zeros_like(parameter)
        all_reduce(parameter.grad)


__all__ = ["sum_gradients", "sum_numbers", "sum_tensor"]
