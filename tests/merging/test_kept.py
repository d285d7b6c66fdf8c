"""One static solution serves every rung: kept in the run, found by what it was made of, anew where that changed."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from test_merging import make_run
from torch import nn

from qd2mora.adapter_folder import base_identity, save_adapter
from qd2mora.data import Pair, Row
from qd2mora.errors import InputRefused
from qd2mora.merging import Export, ExportOptions, merge
from qd2mora.merging.forecast import forecast
from qd2mora.merging.kept_updates import hash_of_rows
from qd2mora.report import show_export, verdict
from qd2mora.report.exports import warning
from qd2mora.run_folder import open_run

LOG = "kept in"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kept")
    run = make_run(folder, "d2mora")
    merge(run, folder / "hf")
    return folder


def report_of(export: Export) -> dict[str, object]:
    content = export.to_json()
    return {name: content[name] for name in ("loss", "gain_kept", "kl_per_token", "bases", "calibration_rows")}


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def test_what_is_kept_gives_the_bytes_and_numbers_of_what_is_made(
    made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = merge(made / "run", tmp_path / "fresh", ExportOptions(keeps=False))
    for name in ("strategy_inputs_of", "measure", "missed"):
        monkeypatch.setattr(f"qd2mora.merging.measured_updates.{name}", None)  # nothing is made or measured again
    again = merge(made / "run", tmp_path / "again")
    assert "taken from there" in caplog.text and "kept from an earlier merge" in verdict(again)
    assert weights(tmp_path / "again") == weights(tmp_path / "fresh") == weights(made / "hf")
    assert report_of(again) == report_of(fresh) and again.unexplained == fresh.unexplained
    assert merge(made / "run", tmp_path / "lora", ExportOptions(to="lora")).strategy == fresh.strategy


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = make_run(tmp_path, "d2mora")
    merge(run, tmp_path / "first", ExportOptions(strategy="core_lsq"))
    return run


def kept_in(run: Path) -> list[Path]:
    return sorted(path for path in (run / "static").iterdir() if not path.name.endswith("-measured"))


def test_another_adapter_is_solved_anew_and_that_is_said(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opened = open_run(run)
    for name, tensor in opened.model.named_parameters():
        if "mixture_B" in name:
            nn.init.constant_(tensor, 0.01)
    save_adapter(opened.model, run / "adapter", base_identity(opened.recipe.base))
    second = merge(run, tmp_path / "second", ExportOptions(strategy="core_lsq"))
    assert "was made of another 'adapter'" in caplog.text and LOG not in caplog.text
    assert weights(tmp_path / "second") == weights_of_fresh(run, tmp_path)
    caplog.clear()
    merge(run, tmp_path / "third", ExportOptions(strategy="core_lsq"))
    assert LOG in caplog.text and second.strategy == "core_lsq" and len(kept_in(run)) == 1


def weights_of_fresh(run: Path, folder: Path) -> dict[str, bytes]:
    merge(run, folder / "fresh", ExportOptions(strategy="core_lsq", keeps=False))
    return weights(folder / "fresh")


def test_other_rows_are_other_solutions(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = next((tmp_path / "data").glob("*.jsonl"))
    lines = data.read_text(encoding="utf-8").splitlines()
    data.write_text("\n".join(lines[1:]) + "\n", encoding="utf-8")
    merge(run, tmp_path / "second", ExportOptions(strategy="core_lsq"))
    assert "was made of another 'rows'" in caplog.text and LOG not in caplog.text


@pytest.mark.parametrize("name", ["updates.safetensors", "manifest.json"])
def test_a_changed_bit_is_found_and_it_is_made_anew(
    name: str, run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (kept,) = kept_in(run)
    content = bytearray((kept / name).read_bytes())
    content[len(content) // 2] ^= 1
    (kept / name).write_bytes(content)
    merge(run, tmp_path / "second", ExportOptions(strategy="core_lsq"))
    assert "not what was written" in caplog.text or "damaged" in caplog.text
    assert weights(tmp_path / "second") == weights(tmp_path / "first")


def test_strategies_and_tasks_are_kept_apart(run: Path, tmp_path: Path) -> None:
    merge(run, tmp_path / "mean", ExportOptions(strategy="mean_gate"))
    merge(run, tmp_path / "task", ExportOptions(strategy="core_lsq", task="first"))
    assert len(kept_in(run)) == 3


def test_a_place_that_cannot_be_written_costs_a_line(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (kept,) = kept_in(run)
    (kept / "thesis.tex").write_text("years of work", encoding="utf-8")
    merge(run, tmp_path / "second", ExportOptions(strategy="core_lsq"))
    assert "are not kept" in caplog.text and (kept / "thesis.tex").is_file()


def test_measuring_takes_the_rows_that_are_asked_for_and_none_says_so(made: Path, tmp_path: Path) -> None:
    some = merge(made / "run", tmp_path / "some", ExportOptions(measured_rows=3))
    assert some.fidelity is not None and 0 < some.fidelity.tokens < _tokens(made / "hf")
    none = merge(made / "run", tmp_path / "none", ExportOptions(measured_rows=0))
    assert none.fidelity is None and "NOT measured" in verdict(none) and warning(none) is None
    report = json.loads((tmp_path / "none/export_report.json").read_text(encoding="utf-8"))
    assert report["measured"].startswith("not measured") and report["loss"] is None
    assert report["modules"] and {each["unexplained"] for each in report["modules"].values()} == {None}
    assert weights(tmp_path / "none") == weights(made / "hf")


def _tokens(folder: Path) -> int:
    return int(json.loads((folder / "export_report.json").read_text(encoding="utf-8"))["held_out_tokens"])


def test_measuring_costs_four_passes_over_held_out_rows_beside_the_original_base(made: Path, tmp_path: Path) -> None:
    from qd2mora.merging import make_static
    from qd2mora.merging.sample import batches_of, sample_rows

    opened = open_run(made / "run")
    passes = [0]
    decoder = opened.model.get_base_model().model
    handle = decoder.register_forward_pre_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))
    made_static = make_static(opened, "core_lsq", measured_rows=0)
    before = passes[0]
    make_static(opened, "core_lsq")
    handle.remove()
    batches = len(batches_of(opened, sample_rows(opened, None).held_out))
    original = (
        1 if "original" in json.loads((made / "hf/export_report.json").read_text(encoding="utf-8"))["bases"] else 0
    )
    assert passes[0] - 2 * before == (4 + original) * batches
    assert not made_static.is_measured and torch.is_tensor(next(iter(made_static.statics.values())).down)


def test_the_verdict_comes_before_the_layers(made: Path, tmp_path: Path) -> None:
    export, console = merge(made / "run", tmp_path / "out"), Console(file=io.StringIO(), width=120)
    with console.capture() as capture:
        show_export(export, tmp_path / "out", console)
    out = capture.get()
    assert 0 < out.index(verdict(export)[:40]) < out.index("held-out loss by task") < out.index("static weights miss")


@pytest.mark.parametrize("text", ["0", "-1", "some", "1e3", "", "٣"])
def test_a_measure_that_is_no_number_is_refused(text: str) -> None:
    from qd2mora.cli.model_verbs import _rows_to_measure

    with pytest.raises(InputRefused, match="--measure"):
        _rows_to_measure(text)
    assert (_rows_to_measure("none"), _rows_to_measure("7"), _rows_to_measure(None)) == (0, 7, None)


@pytest.mark.parametrize("strategy", ["auto", "core_lsq", "sequential", "distill"])
def test_a_merge_is_planned_from_a_few_passes_and_makes_nothing(strategy: str, made: Path) -> None:
    before = sorted(made.rglob("*"))
    line = forecast(made / "run", strategy, None, 5)
    assert "making" in line and "measuring on 5 rows" in line and "estimated from" in line
    assert "about 0 s measuring on 0 rows" in forecast(made / "run", strategy, "first", 0)
    assert sorted(made.rglob("*")) == before


def test_rows_of_the_same_lengths_are_told_apart_by_their_tokens() -> None:
    one, other = (Row(0, np.array([1, 2, last], dtype=np.int32), 1, Pair("", "")) for last in (3, 4))
    assert hash_of_rows([one]) != hash_of_rows([other]) and hash_of_rows([one]) == hash_of_rows([one])
