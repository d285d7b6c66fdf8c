"""Settings for every test: one thread, as in runs that tests fork, and no state left by a trainer."""

import os
from collections.abc import Iterator

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps its precision for the life of a process; trainers of other packages set it to theirs."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
