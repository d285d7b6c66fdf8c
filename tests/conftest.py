"""For every test: one thread, as in runs that tests fork, no state left by a trainer, and a base with tasks."""

import os
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported, and for the programs that tests start: as many threads as cores in each of several test
# processes would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import tiny
import torch
from accelerate.state import AcceleratorState, GradientState

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps its precision for the life of a process; trainers of other packages set it to theirs."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base and two small tasks, for the tests of one file; files that need more have a `made` of their own."""
    folder = tmp_path_factory.mktemp("made")
    tiny.save_base(folder / "base")
    tiny.save_tasks(folder / "data")
    return folder
