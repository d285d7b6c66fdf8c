"""A machine's card is used, or the run does not start."""

from pathlib import Path

import pytest
import torch

from qd2mora.base.device import refuse_unused_card
from qd2mora.errors import InputRefused


@pytest.fixture
def devices(tmp_path: Path) -> Path:
    """A folder as /dev is where a card is in the machine."""
    for name in ("nvidia0", "nvidiactl", "null"):
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.skipif(torch.cuda.is_available(), reason="here the card is used")
def test_a_card_that_torch_cannot_use_is_refused_with_the_reason(
    devices: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(InputRefused, match=r"a GPU is here \(nvidia0\).*CUDA_VISIBLE_DEVICES="):
        refuse_unused_card(devices)


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_a_card_that_is_hidden_is_not_asked_about(devices: Path, monkeypatch: pytest.MonkeyPatch, hidden: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    refuse_unused_card(devices)


def test_a_machine_without_a_card_trains_on_its_processor(tmp_path: Path) -> None:
    (tmp_path / "nvidiactl").touch()  # the driver alone, as in a container that was given no card
    refuse_unused_card(tmp_path)
