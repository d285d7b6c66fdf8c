"""What `bench` measures: that all of it is there, counted right, and that what is missing is said; never a time."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from exported import make_run

from qd2mora.cli import main
from qd2mora.evaluation.efficiency import BenchOptions, _compression, _percentiles, bench
from qd2mora.evaluation.energy import Reading, energy_meter
from qd2mora.evaluation.subject import Subject, open_subject

FEW = BenchOptions(requests=2, rows_at_once=3, prompt=5, tokens=4)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_run(tmp_path_factory.mktemp("bench"), "d2mora")
    steps = [{"step": step, "loss": 1.0, "tokens_per_s": 100.0 * step, "memory": 1000 + step} for step in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps), encoding="utf-8")
    return run


def test_all_measures_are_there_and_tokens_are_counted(run: Path) -> None:
    found = bench(run, FEW, with_plan=True)
    assert found["kind"] == "run" and found["written_tokens"] == 4 * (2 + 3)
    latency, serving, memory = found["latency"], found["serving"], found["memory"]
    assert isinstance(latency, dict) and isinstance(serving, dict) and isinstance(memory, dict)
    for percentiles in latency.values():
        assert 0 < percentiles["p50"] <= percentiles["p95"]
    assert serving["rows_at_once"] == 3 and serving["tokens_per_s"] > 0 and 0 < memory["use"] <= 1
    # What a run's own metrics tell: the median step, the largest memory, beside the planner's.
    assert found["training"] == {"tokens_per_s": 200.0, "steps": 3}
    assert isinstance(found["plan"], dict) and found["plan"]["measured_bytes"] == 1003
    assert found["plan"]["peak_bytes"] > 0 and "whole program" in found["plan"]["why"]


def test_what_is_not_there_is_said(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = run.parent / "base"
    out = run.parent / "bench.json"
    few = ["--requests", "1", "--rows-at-once", "2", "--prompt-tokens", "3", "--new-tokens", "2"]
    monkeypatch.setattr(sys, "argv", ["qd2mora", "bench", str(base), *few, "--out", str(out), "--plan"])
    with pytest.raises(SystemExit) as ended:
        main()
    said = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0 and "this is no run" in said and "this is none" in said
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["kind"] == "model" and found["plan"]["peak_bytes"] is None
    energy = found["energy"]
    assert (energy["joules_per_token"] is None) == energy["source"].startswith("absent")


def test_a_run_that_reads_a_vector_is_measured_and_rows_are_no_measurement(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_run(tmp_path, "reclora", adapter="external_width: 3,")
    assert bench(made, FEW)["written_tokens"] == 20
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a"}\n', encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["qd2mora", "bench", str(made), "--out", str(rows)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and "is not a measurement" in capsys.readouterr().err
    assert rows.read_text(encoding="utf-8") == '{"prompt": "a"}\n'


def test_four_bit_weights_are_counted_by_the_numbers_they_hold(run: Path) -> None:
    whole = _compression(open_subject(run.parent / "base"))
    packed = _compression(Subject(open_subject(run).model.get_base_model(), open_subject(run).tokenizer))
    assert whole["rate"] == pytest.approx(0.5)  # float32 on a CPU
    parameters = whole["parameters"]
    assert isinstance(parameters, int)
    linears = 2 * (64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 172)
    # Besides the adapters, those linears are half a byte each and their scales; all else is float32.
    held = packed["bytes"]
    assert isinstance(held, int)
    adapters = sum(p.numel() for name, p in open_subject(run).model.named_parameters() if "mixture_" in name)
    rest = parameters - linears
    assert packed["parameters"] == parameters + adapters
    assert linears / 2 < held - 4 * (rest + adapters) < linears * 0.6


def test_percentiles_are_values_that_were_measured() -> None:
    assert _percentiles([float(value) for value in range(1, 101)]) == {"p50": 50.0, "p95": 95.0}
    assert _percentiles([3.0]) == {"p50": 3.0, "p95": 3.0}


def write_counter(folder: Path, name: str, micro: int, most: int = 1_000_000) -> None:
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "energy_uj").write_text(f"{micro}\n")
    (folder / name / "max_energy_range_uj").write_text(f"{most}\n")


def test_energy_is_the_difference_of_all_packages_and_counters_may_begin_anew(tmp_path: Path) -> None:
    write_counter(tmp_path, "intel-rapl:0", 900_000)
    write_counter(tmp_path, "intel-rapl:1", 100_000)
    write_counter(tmp_path, "intel-rapl:0:0", 5)  # the cores of package 0, which it counts already
    meter = energy_meter(torch.device("cpu"), tmp_path)
    before = meter.read()
    write_counter(tmp_path, "intel-rapl:0", 50_000)  # past its range
    write_counter(tmp_path, "intel-rapl:1", 300_000)
    after = meter.read()
    assert meter.source == "RAPL" and before is not None and after is not None
    assert math.isclose(after.since(before), 0.15 + 0.2)
    assert Reading({"card": 5.0}, {"card": None}).since(Reading({"card": 2.0}, {"card": None})) == 3.0


def test_where_no_counter_can_be_read_energy_is_absent(tmp_path: Path) -> None:
    meter = energy_meter(torch.device("cpu"), tmp_path)
    assert not meter.is_there and meter.read() is None and meter.source.startswith("absent: no counter of RAPL")
