"""A base and two small tasks for the gates, and one run that nothing happened to."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import forked_runs as runs


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make(tmp_path_factory.mktemp("gates"))


@pytest.fixture(scope="session")
def whole(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the recipe of a run that nothing happened to, with dropout."""
    recipe = runs.write_recipe(made, tmp_path_factory.mktemp("whole") / "run", "adapter.dropout=0.1")
    assert runs.outcome(runs.train_run, recipe) == 0
    return recipe
