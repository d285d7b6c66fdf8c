"""A small state and the calls on it, for gates that need thousands of saves and no model."""

from pathlib import Path

import torch
from torch import nn

from qd2mora.training import checkpoint
from qd2mora.training.progress import Progress, State
from qd2mora.training.updates import PlainUpdater

SHAPES = {"layer.mixture_A": (2, 3, 5), "layer.mixture_B": (2, 7, 3), "layer.mixture_router_down": (2, 5)}


def source_at(step: int) -> PlainUpdater:
    """Return a trained toy: its values depend on the step alone."""
    torch.manual_seed(step)
    parameters = {name: nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.01)
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return PlainUpdater(parameters, optimizer)


def state_at(step: int) -> State:
    adapter, moments, scalars = source_at(step).collect(copied=True)
    return State(adapter, moments, scalars, Progress(step=step, applied=step))


def save(folder: Path, step: int, keep: int = 2) -> Path:
    return checkpoint.save(folder, state_at(step), keep)


def load(folder: Path) -> tuple[int, list[str]]:
    """Return the step that a resume would go on from, after comparing every value with what was saved."""
    state, problems = checkpoint.newest(folder, *source_at(0).expected())
    if state is None:
        return 0, problems
    wanted = state_at(state.progress.step)
    for there, saved in ((state.adapter, wanted.adapter), (state.moments, wanted.moments)):
        assert there.keys() == saved.keys()
        assert all(torch.equal(there[name], saved[name]) for name in saved)
    return state.progress.step, problems
