"""Merging: exact where it can be, measured where it cannot, written weight by weight, loaded by anybody."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from qd2mora.adapter_folder import base_identity, save_adapter
from qd2mora.base import dense_weight, load_base, load_tokenizer
from qd2mora.data import collate, prepare
from qd2mora.errors import InputRefused, NotFinite
from qd2mora.evaluation import Exam, TalkOptions, evaluate, generate
from qd2mora.merging import ExportOptions, core_lsq, mean_gate, merge
from qd2mora.merging.fidelity import unexplained
from qd2mora.merging.statistics import Moments, collect, decode
from qd2mora.mixture import MixtureConfig, add_adapter, mixture_layers
from qd2mora.recipe import load_recipe
from qd2mora.routed.ops import stack_columns
from qd2mora.run_folder import open_run


def make_run(folder: Path, method: str, *, tied: bool = True) -> Path:
    """A run folder whose adapter is random, so that routing matters, made without training."""
    base = tiny.save_base(folder / "base", tied=tied)
    tiny.save_tasks(folder / "data")
    run = folder / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(tiny.recipe_text(base, folder / "data", run, method=method), encoding="utf-8")
    recipe = load_recipe(run / "recipe.yaml")
    model = add_adapter(load_base(recipe.base), MixtureConfig.from_recipe(recipe.adapter, 2), 0)
    torch.manual_seed(0)
    for name, tensor in model.named_parameters():
        if "mixture_" in name:
            nn.init.normal_(tensor, std=0.1 if "mixture_B" in name else 0.3)
    save_adapter(model, run / "adapter", base_identity(recipe.base))
    load_tokenizer(recipe.base.model).save_pretrained(run)
    return run


def batches(run: Path) -> list[dict[str, torch.Tensor]]:
    opened = open_run(run)
    tasks = prepare(opened.recipe.data, opened.tokenizer, 0)
    return [collate(task.train[:8], opened.tokenizer.pad_token_id) for task in tasks]


@pytest.mark.parametrize("method", ["lora", "moslora", "moelora"])
@pytest.mark.parametrize("tied", [True, False])
def test_an_export_without_token_routing_is_exact_to_rounding(method: str, tied: bool, tmp_path: Path) -> None:
    run = make_run(tmp_path, method, tied=tied)
    task = "last" if method == "moelora" else None
    export = merge(run, tmp_path / "out", ExportOptions(task=task))
    opened = open_run(run)
    model = opened.model
    model.base_model.routing.task_index = torch.tensor([1])
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert ("lm_head.weight" in written) != tied
    for name, layer in mixture_layers(model).items():
        down, up = (layer.tensors("default")[key] for key in ("mixture_A", "mixture_B"))
        x = torch.zeros(1, 1, layer.in_features)
        static = layer.mixing(x, "default")[0, 0]
        scaling = layer.mixture_config["default"].scaling
        dense = dense_weight(layer.base_layer) + scaling * stack_columns(up) @ static @ down.flatten(0, 1)
        torch.testing.assert_close(written[f"{name}.weight"].float(), dense.detach(), rtol=1e-3, atol=1e-6)
    assert export.exact and max(export.unexplained.values()) < 1e-5  # float32 products
    assert export.fidelity is not None and abs(export.fidelity.kl_per_token) < 1e-5


def test_routing_by_task_needs_the_task(tmp_path: Path) -> None:
    run = make_run(tmp_path, "moelora")
    with pytest.raises(InputRefused, match="first, last"):
        merge(run, tmp_path / "out")
    with pytest.raises(InputRefused, match="no task 'other'"):
        merge(run, tmp_path / "out", ExportOptions(task="other"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["d2mora", "hydralora"])
def test_least_squares_is_never_worse_than_mean_gates_where_it_was_fitted(method: str, tmp_path: Path) -> None:
    run = make_run(tmp_path, method)
    model = open_run(run).model
    layers = mixture_layers(model)
    for name, moments in collect(model, batches(run)).items():
        up = stack_columns(layers[name].tensors("default")["mixture_B"]).detach()
        fitted, mean = (unexplained(moments, module.mixing(moments), up) for module in (core_lsq, mean_gate))
        assert fitted <= mean + 1e-9, name


def test_constant_gates_are_explained_wholly(tmp_path: Path) -> None:
    run = make_run(tmp_path, "d2mora")
    model = open_run(run).model
    for name, tensor in model.named_parameters():
        if "router" in name:
            tensor.data.zero_()
    layers = mixture_layers(model)
    for name, moments in collect(model, batches(run)).items():
        up = stack_columns(layers[name].tensors("default")["mixture_B"]).detach()
        for module in (core_lsq, mean_gate):
            assert unexplained(moments, module.mixing(moments), up) < 1e-6, name


def test_moments_are_means_over_attended_tokens(tmp_path: Path) -> None:
    run = make_run(tmp_path, "d2mora")
    opened = open_run(run)
    rows = prepare(opened.recipe.data, opened.tokenizer, 0)[0].train[:3]
    narrow = collect(opened.model, [collate(rows, 3, multiple=1)])
    wide = collect(opened.model, [collate(rows, 3, multiple=64)])
    apart = collect(opened.model, [collate([row], 3, multiple=1) for row in rows])
    tokens = sum(len(row.ids) for row in rows)
    for name, moments in narrow.items():
        assert moments.tokens == wide[name].tokens == apart[name].tokens == tokens
        for key in ("uu", "vu", "vv", "mixing"):
            for other in (wide[name], apart[name]):
                torch.testing.assert_close(getattr(moments, key), getattr(other, key), rtol=1e-4, atol=1e-4)


def test_statistics_cost_one_small_product_a_linear_beside_the_pass(tmp_path: Path) -> None:
    run = make_run(tmp_path, "d2mora")
    model, given = open_run(run).model, batches(run)
    with FlopCounterMode(display=False) as plain, torch.no_grad():
        for batch in given:
            decode(model, batch)
    with FlopCounterMode(display=False) as counted:
        moments = collect(model, given, with_mixing=False)
    tokens = sum(batch["input_ids"].numel() for batch in given)
    products = sum(2 * tokens * len(each.second) ** 2 for each in moments.values())
    assert counted.get_total_flops() == plain.get_total_flops() + products


def test_the_unexplained_share_is_that_of_the_tokens_themselves() -> None:
    torch.manual_seed(0)
    u, v, up = torch.randn(50, 6), torch.randn(50, 4), torch.randn(9, 4)
    moments = Moments(4, 6)
    moments.add(u, v, torch.ones(50), torch.zeros(4, 6))
    static = torch.randn(4, 6, dtype=torch.float64)
    error = (v.double() - u.double() @ static.T) @ up.double().T
    wanted = float(error.square().sum() / (v.double() @ up.double().T).square().sum())
    assert unexplained(moments, static, up) == pytest.approx(wanted, rel=1e-5)


def test_the_report_says_what_an_approximate_export_keeps(tmp_path: Path) -> None:
    run = make_run(tmp_path, "d2mora")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    merge(run, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "export_report.json").read_text(encoding="utf-8"))
    assert set(report["loss"]) == {"base", "routed", "merged"}
    assert {"gain_kept", "kl_per_token"} <= report.keys()
    assert len(report["modules"]) == 6
    assert all(0 < module["unexplained"] < 1 for module in report["modules"].values())
    assert report["kl_per_token"] > 0
    kept = run / "static"  # what the next export is made of
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and not path.is_relative_to(kept)}
    assert after == before
    with pytest.raises(InputRefused, match="not empty"):
        merge(run, tmp_path / "out")
    with pytest.raises(InputRefused, match="did you mean 'core_lsq'"):
        merge(run, tmp_path / "other", ExportOptions(strategy="core_lqs"))


def test_the_export_is_the_model_that_the_report_measured(tmp_path: Path) -> None:
    run = make_run(tmp_path, "d2mora")
    export = merge(run, tmp_path / "out")
    scores = evaluate(tmp_path / "out", Exam(run / "recipe.yaml"))
    assert export.fidelity is not None
    loss = sum(score.loss for score in scores.values()) / 2
    assert loss == pytest.approx(export.fidelity.merged, rel=2e-2)


def test_an_export_writes_the_text_that_its_run_writes(tmp_path: Path) -> None:
    """In transformers alone; that it loads where this package cannot be imported is `test_lora`'s."""
    run = make_run(tmp_path, "lora")
    merge(run, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("red sun", return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(out, skip_special_tokens=True) == generate(
        run, "red sun", TalkOptions(max_new_tokens=6), raw=True
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in config and config["dtype"] == "float16"


def test_a_weight_that_does_not_fit_float16_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    run = make_run(tmp_path, "lora")
    opened = open_run(run)
    for name, tensor in opened.model.named_parameters():
        if "mixture_" in name:
            tensor.data.fill_(1e3)
    save_adapter(opened.model, run / "adapter", base_identity(opened.recipe.base))
    with pytest.raises(NotFinite, match="float16"):
        merge(run, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
