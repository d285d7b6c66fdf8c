"""A run that is broken off: a signal comes at a step of one's choice."""

import os
import signal

import pytest

from qd2mora.training.journal import StepDisplay


def stop_after(last: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a SIGTERM come while the step of that number is shown."""
    show = StepDisplay.step

    def interrupt(self: StepDisplay, step: int, metrics: dict[str, float]) -> None:
        show(self, step, metrics)
        if step == last:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(StepDisplay, "step", interrupt)


__all__ = ["stop_after"]
