"""Files of few bits: llama.cpp's own quantiser makes them, and what they keep is measured on the file."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from exported import make_run
from torch.nn import functional as F  # noqa: N812

from qd2mora.base import load_base
from qd2mora.data import collate, prepare
from qd2mora.disk.gguf_header import read_header
from qd2mora.errors import InputRefused
from qd2mora.merging import Export, ExportOptions, merge
from qd2mora.recipe import Base
from qd2mora.report.exports import show_export, verdict
from qd2mora.run_folder import open_run
from qd2mora.terminal import Screen

pytest.importorskip("gguf")
Q4_K, Q5_0, Q6_K, Q8_0 = 12, 6, 14, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantised")
    tiny.save_base(folder / "base", hidden=256)
    tiny.save_tasks(folder / "data")
    make_run(folder, "d2mora")
    return folder


def run_of(folder: Path) -> Path:
    return folder / "run-d2mora-nf4"


@pytest.fixture(scope="module")
def small(folder: Path) -> Export:
    pytest.importorskip("llama_cpp")
    return merge(run_of(folder), folder / "q4", ExportOptions(to="gguf", dtype="q4_k_m", strategy="mean_gate"))


def slowly(model: object, rows: list, tokenizer_pad: int) -> list[torch.Tensor]:
    """Log probabilities of each row's answer, one row at a time."""
    found = []
    for row in rows:
        batch = collate([row], tokenizer_pad)
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[0].float()
        place = torch.arange(row.masked, len(row.ids)) - 1
        found.append(logits[place].log_softmax(-1))
    return found


def test_the_file_is_one_of_few_bits_and_the_f16_one_is_gone(folder: Path, small: Export) -> None:
    (path,) = (folder / "q4").glob("*.gguf")
    assert path.name == "run-d2mora-nf4-q4_k_m.gguf"
    kinds = {name: place.kind for name, place in read_header(path).tensors.items()}
    assert kinds["blk.0.attn_q.weight"] == Q4_K and kinds["blk.0.attn_norm.weight"] == 0
    assert kinds["blk.0.ffn_down.weight"] not in (Q4_K, Q6_K)  # 172 columns do not divide into blocks of 256
    assert small.written.kinds["Q4_K"] == list(kinds.values()).count(Q4_K) > 4
    f16 = merge(run_of(folder), folder / "f16", ExportOptions(to="gguf", strategy="mean_gate"))
    assert small.written.num_bytes < 0.6 * f16.written.num_bytes


def test_what_is_kept_is_that_of_the_file_itself(folder: Path, small: Export) -> None:
    opened = open_run(run_of(folder))
    (path,) = (folder / "q4").glob("*.gguf")
    tasks = prepare(opened.recipe.data, opened.tokenizer, opened.recipe.train.seed)
    rows, pad = [row for task in tasks for row in task.validation], opened.tokenizer.pad_token_id
    routed = torch.cat(slowly(opened.model, rows, pad))
    file = torch.cat(slowly(load_base(Base(model=str(path), quantization="none")), rows, pad))
    labels = torch.cat([torch.from_numpy(row.ids[row.masked :].astype("int64")) for row in rows])
    found = small.as_written
    assert found is not None and found.tokens == len(labels)
    assert found.merged == pytest.approx(float(F.nll_loss(file, labels)), rel=1e-4)
    assert found.routed == pytest.approx(float(F.nll_loss(routed, labels)), rel=1e-4)
    kl = float((routed.exp() * (routed - file)).sum(-1).mean())
    assert found.kl_per_token == pytest.approx(kl, rel=1e-3)
    assert found.agreement == pytest.approx(float((routed.argmax(-1) == file.argmax(-1)).float().mean()))
    assert set(found.tasks) == {"first", "last"}


def test_the_report_tells_both_what_fp16_keeps_and_what_the_file_does(
    folder: Path, small: Export, capsys: pytest.CaptureFixture[str]
) -> None:
    report = json.loads((folder / "q4" / "export_report.json").read_text(encoding="utf-8"))
    before = report["bases"]["dequantized"]
    assert report["measured"] == "as written" and report["loss"]["merged"] != before["loss"]["merged"]
    assert report["loss"]["base"] == before["loss"]["base"]
    assert report["kl_per_token"] > before["kl_per_token"]
    assert {each["rounding"] for each in report["modules"].values()} == {None}
    show_export(small, folder / "q4", Screen())
    told = capsys.readouterr().out
    assert "measured on the file itself" in told and "before quantising: loss" in told and "Q4_K" in told
    assert verdict(small) in told


@pytest.mark.parametrize(("dtype", "kind"), [("q6_k", Q6_K), ("q4_0", 2), ("q5_k_m", 13)])
def test_other_kinds_are_made_too_and_measuring_can_be_left_out(
    folder: Path, tmp_path: Path, dtype: str, kind: int
) -> None:
    pytest.importorskip("llama_cpp")
    options = ExportOptions(to="gguf", dtype=dtype, strategy="mean_gate", measured_rows=0)
    made = merge(run_of(folder), tmp_path / "out", options)
    (path,) = (tmp_path / "out").glob(f"*-{dtype}.gguf")
    assert read_header(path).tensors["blk.1.attn_q.weight"].kind == kind
    assert made.as_written is None and "NOT measured" in verdict(made)


def test_bf16_is_bfloat16_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    options = {"strategy": "mean_gate", "measured_rows": 0}
    merge(run_of(folder), tmp_path / "gguf", ExportOptions(to="gguf", dtype="bf16", **options))
    merge(run_of(folder), tmp_path / "hf", ExportOptions(to="hf", dtype="bfloat16", **options))
    (path,) = (tmp_path / "gguf").glob("*-bf16.gguf")
    theirs, ours = (
        load_base(Base(model=str(place), quantization="none"), dtype=torch.bfloat16).state_dict()
        for place in (tmp_path / "hf", path)
    )
    assert theirs.keys() == ours.keys() and all(tensor.equal(ours[name]) for name, tensor in theirs.items())


def test_a_missing_quantiser_is_said_with_how_to_install_it_before_anything_is_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(InputRefused, match=r"pip install 'qd2mora\[quantise\]'.*built from source"):
        merge(run_of(folder), tmp_path / "out", ExportOptions(to="gguf", dtype="q4_k_m"))
    assert not (tmp_path / "out").exists()


LLAMA_CPP = {
    "float16": 0.01,
    "bfloat16": 0.01,
    "q8_0": 0.02,
    "q6_k": 0.03,
    "q5_k_m": 0.03,
    "q4_k_m": 0.03,
    "q4_0": 0.03,
}
"""How far its logits may be: it rounds what goes into a product to 16 bits, or to 8 where the weights are of few."""


@pytest.mark.parametrize("dtype", LLAMA_CPP)
def test_llama_cpp_computes_what_a_file_says_when_it_is_read_back_here(
    folder: Path, tmp_path: Path, dtype: str
) -> None:
    llama = pytest.importorskip("llama_cpp")
    options = {"strategy": "mean_gate", "measured_rows": 0}
    merge(run_of(folder), tmp_path / "out", ExportOptions(to="gguf", dtype=dtype, **options))
    (path,) = (tmp_path / "out").glob("*.gguf")
    ids = list(range(4, 44))
    theirs = llama.Llama(str(path), n_ctx=64, logits_all=True, verbose=False, type_k=0, type_v=0)
    theirs.eval(ids)
    found = torch.from_numpy(np.array(theirs.scores[: len(ids)]))
    theirs.close()
    with torch.no_grad():
        wanted = load_base(Base(model=str(path), quantization="none"))(input_ids=torch.tensor([ids])).logits[0]
    assert float((found - wanted).norm() / wanted.norm()) < LLAMA_CPP[dtype]
