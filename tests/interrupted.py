"""A run that is broken off: a signal comes at a step of one's choice."""

import os
import signal

import pytest

from qd2mora.errors import SignalStop
from qd2mora.recipe import Recipe
from qd2mora.training import train
from qd2mora.training.journal import StepDisplay


def stop_after(last: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a SIGTERM come while the step of that number is shown."""
    show = StepDisplay.step

    def interrupt(self: StepDisplay, step: int, metrics: dict[str, float]) -> None:
        show(self, step, metrics)
        if step == last:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(StepDisplay, "step", interrupt)


def train_in_two(recipe: Recipe, last: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train, broken off at the step of that number and resumed."""
    with monkeypatch.context() as patched, pytest.raises(SignalStop):
        stop_after(last, patched)
        train(recipe)
    train(recipe, resume=True)


__all__ = ["stop_after", "train_in_two"]
