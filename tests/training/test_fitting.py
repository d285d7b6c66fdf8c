"""A resumed run goes on with the micro batch that it began with, whatever memory is free by then."""

import json

import pytest
import torch

from qd2mora.memory.plan import plan
from qd2mora.recipe import Recipe, parse_recipe
from qd2mora.training.fitting import fitting_plan
from qd2mora.training.identity import Manifest
from qd2mora.training.processes import Processes

CPU = torch.device("cpu")
ALONE = Processes(0, 1, CPU)


def recipe() -> Recipe:
    return parse_recipe(
        {
            "base": {"model": "random:llama2-7b"},
            "adapter": {"method": "d2mora"},
            "data": {"tasks": [{"name": "any", "path": "any.jsonl"}], "max_length": 256},
            "train": {"steps": 1, "optimizer": "auto"},
            "output": "runs/any",
        }
    )


def begun_on(free: int, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    monkeypatch.setattr("qd2mora.memory.place.available_bytes", lambda: free)
    manifest = {"plan": json.loads(json.dumps(plan(recipe(), device=CPU).to_json()))}
    return manifest  # type: ignore[return-value]


def test_more_free_memory_does_not_change_what_a_resumed_run_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    ample = plan(recipe(), 80 << 30, CPU)
    least = plan(recipe(), 1 << 20, CPU).peak_bytes
    begun = begun_on(int(1.1 * least), monkeypatch)
    monkeypatch.setattr("qd2mora.memory.place.available_bytes", lambda: 80 << 30)
    small, other = fitting_plan(recipe(), ALONE, begun), fitting_plan(recipe(), ALONE)
    assert small.micro_batch < ample.micro_batch == other.micro_batch
    assert (small.layout.optimizer, other.layout.optimizer) == ("adamw_8bit", "adamw")


def test_where_the_plan_of_the_beginning_does_not_fit_any_more_it_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    begun = begun_on(80 << 30, monkeypatch)
    least = plan(recipe(), 1 << 20, CPU).peak_bytes
    monkeypatch.setattr("qd2mora.memory.place.available_bytes", lambda: int(1.1 * least))
    assert fitting_plan(recipe(), ALONE, begun).micro_batch < 8
    assert "does not fit any more" in caplog.text
