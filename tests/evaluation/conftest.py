"""Lets these tests import `asking`, and keeps one run for all of them."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import asking

from qd2mora.evaluation import Subject, open_subject


@pytest.fixture(scope="package")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("asked")
    asking.save_run(folder, "run")
    asking.save_suite(folder / "suite")
    return folder


@pytest.fixture(scope="package")
def subject(made: Path) -> Subject:
    return open_subject(made / "run")
