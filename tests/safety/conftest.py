"""A whole small run for the gates, made once."""

from pathlib import Path

import gate_canaries
import input_gates as gates
import pytest


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    gates.warm_up()
    return gate_canaries.make_run(tmp_path_factory.mktemp("made"))
