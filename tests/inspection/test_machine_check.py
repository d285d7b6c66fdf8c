"""What `doctor` says is what is there."""

import json
import sys
from pathlib import Path

import pytest
import torch

from qd2mora.base import compute_dtype, default_device
from qd2mora.cli import main
from qd2mora.inspection.machine_check import check_machine
from qd2mora.recipe import Base


def doctor(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["qd2mora", "doctor", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0


def test_a_machine_is_told_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    doctor(monkeypatch, str(tmp_path), "--json")
    facts = {fact["topic"]: fact for fact in json.loads(capsys.readouterr().out)}
    dtype = compute_dtype(Base(model="random:tiny"), default_device())
    assert facts["products"]["found"] == str(dtype).removeprefix("torch.")
    assert facts["4-bit weights"]["found"] == "bitsandbytes works"
    assert f"torch {torch.__version__}" in facts["packages"]["found"]
    assert not list(tmp_path.iterdir())  # the probe is gone


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a card")
def test_a_machine_without_a_card_has_no_kernels_to_speak_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    doctor(monkeypatch, str(tmp_path))
    told = capsys.readouterr().out
    assert "graphics card" in told
    assert "none" in told
    assert "kernels" not in told


def test_a_disk_that_cannot_be_written_is_a_problem(tmp_path: Path) -> None:
    (problem,) = [fact for fact in check_machine(tmp_path / "missing") if fact.is_problem]
    assert problem.topic == "disk"
    assert "missing" in problem.found
