"""Routing while a run goes on: written at each evaluation, told once where it collapses, kept in routing.json."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from interrupted import stop_after

from qd2mora.errors import SignalStop
from qd2mora.inspection import NO_ROUTERS, inspect_run
from qd2mora.mixture import mixture_layers
from qd2mora.recipe import Recipe, load_recipe
from qd2mora.training import run as training
from qd2mora.training import train


def recipe(made: Path, output: Path, *overrides: str, method: str = "d2mora") -> Recipe:
    path = output.parent / f"{output.name}.yaml"
    path.write_text(tiny.recipe_text(made / "base", made / "data", output, method=method), encoding="utf-8")
    return load_recipe(path, overrides)


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def report_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "routing.json").read_text(encoding="utf-8"))


def test_a_healthy_run_tells_its_routing_and_raises_no_alarm(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(recipe(made, tmp_path / "run"))
    assert "collapsed" not in capsys.readouterr().out
    told = [line for line in lines_of(tmp_path / "run") if "routing" in line]
    assert [line["step"] for line in told] == [0, 3, 6]
    assert not any("alarm" in line for line in told)
    numbers = told[-1]["routing"]
    assert numbers["routers"] == 2 * 2 * 3 and numbers["collapsed"] == 0
    assert 0.5 < numbers["entropy"] <= numbers["entropy_of_mean"] <= 1
    assert told[0]["routing"]["cos_up"] == 0 < numbers["cos_up"] <= 1
    report = report_of(tmp_path / "run")
    assert (report["step"], report["tasks"], report["alarm"]) == (6, ["first", "last"], None)
    assert report["rows"] == {"first": {"held out": 8}, "last": {"held out": 8}}
    assert report["summary"] == numbers


def test_what_training_kept_is_what_a_later_look_finds(made: Path, tmp_path: Path) -> None:
    train(recipe(made, tmp_path / "run"))
    kept, found = report_of(tmp_path / "run"), json.loads(json.dumps(inspect_run(tmp_path / "run").to_json()))
    for one, two in zip(kept["routers"], found["routers"], strict=True):
        assert one["module"] == two["module"] and one["tokens"] == two["tokens"]
        for task in range(2):
            assert one["usage"][task] == pytest.approx(two["usage"][task], abs=1e-5)
    assert kept["banks"] == found["banks"] and kept["projection"] == found["projection"]


def test_a_planted_collapse_is_told_once_and_written_at_each_evaluation(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build = training._adapted_model

    def planted(*arguments: Any) -> Any:
        model = build(*arguments)
        with torch.no_grad():
            layer = mixture_layers(model)["model.layers.1.self_attn.v_proj"]
            layer.tensors("default")["mixture_bias_down"][2] = 30.0
        return model

    monkeypatch.setattr(training, "_adapted_model", planted)
    train(recipe(made, tmp_path / "run", "adapter.gates={down: {score: bias}}"))
    out = capsys.readouterr().out
    (said,) = [line for line in out.splitlines() if line.startswith("warning: routing collapsed")]
    assert "1 of 12 routers: model.layers.1.self_attn.v_proj (down) sends 100% to expert 2 of 4" in said
    alarms = [line for line in lines_of(tmp_path / "run") if "alarm" in line]
    assert [line["step"] for line in alarms] == [0, 3, 6]
    assert "warning: " + alarms[0]["alarm"] == said
    assert report_of(tmp_path / "run")["alarm"] == alarms[-1]["alarm"]


def test_a_run_that_was_broken_off_leaves_the_same_report_as_a_whole_one(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(recipe(made, tmp_path / "whole"))
    with monkeypatch.context() as patched, pytest.raises(SignalStop):
        stop_after(4, patched)
        train(recipe(made, tmp_path / "broken"))
    train(recipe(made, tmp_path / "broken"), resume=True)
    assert (tmp_path / "whole" / "routing.json").read_bytes() == (tmp_path / "broken" / "routing.json").read_bytes()
    told = [
        [line["routing"] for line in lines_of(tmp_path / name) if "routing" in line] for name in ("whole", "broken")
    ]
    assert told[0] == told[1] and len(told[0]) == 3


def test_without_held_out_rows_training_rows_are_watched(made: Path, tmp_path: Path) -> None:
    train(recipe(made, tmp_path / "run", "data.tasks.0.validation=0", "data.tasks.1.validation=0"))
    assert not any("eval_loss" in line for line in lines_of(tmp_path / "run"))
    assert [line["step"] for line in lines_of(tmp_path / "run") if "routing" in line] == [3, 6]
    assert report_of(tmp_path / "run")["rows"] == {"first": {"training": 32}, "last": {"training": 32}}


def test_a_method_without_routers_says_so(made: Path, tmp_path: Path) -> None:
    train(recipe(made, tmp_path / "run", method="lora"))
    assert not any("routing" in line for line in lines_of(tmp_path / "run"))
    report = report_of(tmp_path / "run")
    assert (report["note"], report["routers"], report["banks"]) == (NO_ROUTERS, [], [])
