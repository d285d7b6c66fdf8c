"""Strategies: what each promises of the static updates it makes, on a small routed run."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from live_bytes import peak_bytes
from torch import Tensor, nn

from qd2mora.adapter_folder import base_identity, save_adapter
from qd2mora.base import load_base, load_tokenizer
from qd2mora.errors import InputRefused
from qd2mora.memory.checkpointing import decoder_layers
from qd2mora.memory.loss import RowLoss
from qd2mora.merging import ExportOptions, core_lsq, make_static, mean_gate, merge, merge_tasks
from qd2mora.merging.auto import affordable_steps, auto
from qd2mora.merging.distill import Teacher, distill, mean_divergence
from qd2mora.merging.fidelity import measure, missed, unexplained
from qd2mora.merging.measured_updates import strategy_inputs_of
from qd2mora.merging.sample import batches_of, sample_rows
from qd2mora.merging.sequential import sequential, stages
from qd2mora.merging.static_updates import of_core, of_cores, replaced
from qd2mora.merging.statistics import balanced, collect, decode, observed
from qd2mora.merging.strategies import STRATEGIES
from qd2mora.merging.strategy_inputs import StrategyInputs
from qd2mora.mixture import MixtureConfig, add_adapter, mixture_layers
from qd2mora.mixture.low_rank import LowRank
from qd2mora.recipe import load_recipe
from qd2mora.report import verdict
from qd2mora.report.exports import warning
from qd2mora.run_folder import OpenRun, RunFolder, open_run

PLAN = {"choices": {"train.micro_batch": {"value": 4}, "memory.checkpointing": {"value": "off"}}}


def make_run(folder: Path, adapter: str = "method: d2mora", train: str = "", spread: float = 0.3) -> Path:
    """A run whose adapter is random, so that routing matters, as if trained as its recipe says."""
    base = tiny.save_base(folder / "base")
    tiny.save_tasks(folder / "data")
    run = folder / "run"
    run.mkdir()
    text = tiny.recipe_text(base, folder / "data", run, train=train).replace("method: d2mora", adapter)
    (run / "recipe.yaml").write_text(text, encoding="utf-8")
    (run / "manifest.json").write_text(json.dumps({"plan": PLAN}), encoding="utf-8")
    recipe = load_recipe(run / "recipe.yaml")
    model = add_adapter(load_base(recipe.base), MixtureConfig.from_recipe(recipe.adapter, 2), 0)
    torch.manual_seed(0)
    for name, tensor in model.named_parameters():
        if "mixture_" in name:
            nn.init.normal_(tensor, std=0.1 if "mixture_B" in name else spread)
    save_adapter(model, run / "adapter", base_identity(recipe.base))
    load_tokenizer(recipe.base.model).save_pretrained(run)
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("routed"))


@pytest.fixture(scope="module")
def opened(run: Path) -> OpenRun:
    return open_run(run)


@pytest.fixture
def setting(opened: OpenRun) -> StrategyInputs:
    made = strategy_inputs_of(opened, sample_rows(opened, None), None)
    made.trained_rows = 1500
    return made


def closed_form(setting: StrategyInputs, mixing: Any = core_lsq.mixing) -> dict[str, LowRank]:
    return of_cores(setting.model, {name: mixing(each) for name, each in setting.moments(with_mixing=True).items()})


def distance(setting: StrategyInputs, statics: dict[str, LowRank]) -> float:
    return mean_divergence(setting.model, statics, setting.calibration, Teacher(setting.model))


def test_more_features_never_explain_less_where_they_were_fitted(setting: StrategyInputs) -> None:
    layers = mixture_layers(setting.model)
    for name, moments in setting.moments(with_mixing=True).items():
        up = layers[name].columns("default").detach()
        assert moments.num_routers == 4  # the down router reads x, the up router does not
        with_routers, alone, mean = (
            unexplained(moments, core, up)
            for core in (
                core_lsq.mixing(moments),
                core_lsq.mixing(moments, with_routers=False),
                mean_gate.mixing(moments),
            )
        )
        assert with_routers <= alone + 1e-9 <= mean + 2e-9, name


def test_a_core_becomes_the_narrower_pair_of_factors(opened: OpenRun) -> None:
    layer = next(iter(mixture_layers(opened.model).values()))
    rows, columns = layer.linear_rows("default").detach().double(), layer.columns("default").detach().double()
    for width in (16, 20):  # as wide as A, and with the router's rows
        core = torch.randn(12, width, dtype=torch.float64)
        static = of_core(layer, core)
        assert static.rank == 12
        wanted = layer.scaling("default") * columns @ core @ rows[:width]
        torch.testing.assert_close(static.dense().double(), wanted, rtol=1e-4, atol=1e-4)


def test_statistics_of_all_linears_come_from_one_pass(setting: StrategyInputs) -> None:
    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    decoder: Any = setting.model.get_base_model().get_decoder()
    handle = decoder.register_forward_pre_hook(count)
    closed_form(setting)
    closed_form(setting, mean_gate.mixing)
    handle.remove()
    assert passes == len(setting.calibration)


def test_answers_count_as_much_as_prompts_and_every_row_alike(setting: StrategyInputs) -> None:
    for batch in setting.calibration:
        weight, labels = balanced(batch), batch["labels"]
        answers = torch.zeros_like(weight, dtype=torch.bool)
        answers[:, :-1] = labels[:, 1:] != -100
        for part in (answers, ~answers):
            torch.testing.assert_close((weight * part).sum(1), torch.full((len(labels),), 0.5))
        assert not weight[batch["attention_mask"] == 0].any() and (weight[answers] > 0).all()
    tokens = next(iter(setting.moments().values())).tokens
    assert tokens == pytest.approx(sum(len(batch["labels"]) for batch in setting.calibration))


def test_sequential_begins_as_least_squares_and_then_sees_what_static_layers_do(setting: StrategyInputs) -> None:
    first, second = stages(setting.model)
    together, one_by_one = closed_form(setting), sequential(setting.model, setting.calibration)
    for name in first:
        assert torch.equal(together[name].dense(), one_by_one[name].dense())
    with replaced(setting.model, {name: together[name] for name in first}):
        moments = collect(setting.model, setting.calibration, names=second, weigh=balanced)
    for name, each in moments.items():
        wanted = of_cores(setting.model, {name: core_lsq.mixing(each)})[name].dense()
        torch.testing.assert_close(one_by_one[name].dense(), wanted)
        assert not torch.equal(together[name].dense(), wanted)


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_constant_gates_are_kept_wholly_by_every_strategy(strategy: str, tmp_path: Path) -> None:
    run = make_run(tmp_path)
    opened = open_run(run)
    for name, tensor in opened.model.named_parameters():
        if "router" in name:
            tensor.data.zero_()
    made = make_static(opened, strategy, "last")
    assert not made.exact
    assert made.bases["dequantized"].kl_per_token < 1e-4
    assert max(made.unexplained.values()) < 1e-3


def test_distillation_brings_the_static_model_nearer(setting: StrategyInputs) -> None:
    start = closed_form(setting)
    student = distill(setting, start, 20)
    assert distance(setting, student) < 0.9 * distance(setting, start)
    for name, static in student.items():
        assert static.rank <= start[name].rank and not static.up.requires_grad
    assert not setting.model.training


def test_distillation_begins_where_it_is_told(setting: StrategyInputs) -> None:
    start = closed_form(setting)
    for name, static in distill(setting, start, 0).items():
        torch.testing.assert_close(static.dense(), start[name].dense(), rtol=1e-4, atol=1e-5)


def test_distillation_recomputes_activations_where_training_did_with_the_same_result(setting: StrategyInputs) -> None:
    start = closed_form(setting)
    kept, layers = distill(setting, start, 2), decoder_layers(setting.model.get_base_model())
    for recomputed in (1, 2):
        setting.recomputed = recomputed
        for name, static in distill(setting, start, 2).items():
            torch.testing.assert_close(static.dense(), kept[name].dense(), rtol=1e-4, atol=1e-5)
        assert [layer.gradient_checkpointing for layer in layers] == [True, recomputed == 2]


@pytest.mark.parametrize(("told", "recomputed"), [("off", 0), (1, 1), ("on", 2)])
def test_distillation_recomputes_as_many_layers_as_the_training_was_planned_with(
    opened: OpenRun, tmp_path: Path, told: object, recomputed: int
) -> None:
    choices = PLAN["choices"] | {"memory.checkpointing": {"value": told}}
    (tmp_path / "manifest.json").write_text(json.dumps({"plan": {"choices": choices}}), encoding="utf-8")
    elsewhere = replace(opened, folder=RunFolder(tmp_path))
    made = strategy_inputs_of(elsewhere, sample_rows(opened, None), None)
    assert made.recomputed == recomputed
    assert made.forward == pytest.approx(1 / (2 + recomputed / 2))


def test_a_step_of_distillation_takes_no_more_memory_than_one_of_training(setting: StrategyInputs, run: Path) -> None:
    trained = open_run(run)
    batch, tensors = setting.training[0], []
    for name, tensor in trained.model.named_parameters():
        if "mixture_" in name:
            tensors.append(tensor.requires_grad_())

    def train() -> None:
        optimizer = torch.optim.AdamW(tensors)
        for _ in range(2):
            RowLoss(trained.model)(batch).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    start = closed_form(setting)
    # Beside what training has: the factors themselves, which training holds from before, their start in a basis, and
    # the teacher's final hidden states.
    wanted = 4 * 64 * batch["input_ids"].numel()
    factors = sum(each.up.nbytes + each.down.nbytes for each in start.values())
    assert peak_bytes(lambda: distill(setting, start, 1)) < peak_bytes(train) + 2 * factors + wanted


def test_auto_takes_what_is_nearest_on_rows_that_nothing_was_fitted_to(setting: StrategyInputs) -> None:
    chosen = auto(setting)
    tried, best = setting.notes["tried"], setting.notes["chosen"]
    assert isinstance(tried, dict) and set(tried) == {"core_lsq", "mean_gate", "distill"}
    assert best == min(tried, key=tried.__getitem__)
    found = mean_divergence(setting.model, chosen, setting.checking, Teacher(setting.model))
    assert found == pytest.approx(tried[best], rel=1e-4)


def test_auto_spends_a_fifth_of_the_training_at_most(setting: StrategyInputs) -> None:
    cost = 0.0

    def count(_: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        nonlocal cost
        cost += len(named["input_ids"]) * (1.0 if torch.is_grad_enabled() else setting.forward)

    decoder: Any = setting.model.get_base_model().get_decoder()
    handle = decoder.register_forward_pre_hook(count, with_kwargs=True)
    auto(setting)
    handle.remove()
    assert 0.1 * setting.trained_rows < cost <= 0.2 * setting.trained_rows
    before = affordable_steps(setting)
    setting.recomputed = 2  # the training's own forward pass is a smaller part of what it cost
    assert affordable_steps(setting) > before
    setting.trained_rows = 100
    assert affordable_steps(setting) < 0


def test_an_adapter_is_static_where_its_recipe_makes_its_gates_so(tmp_path: Path) -> None:
    gates = "{up: {input: none, score: static}}"
    run = make_run(tmp_path, f"method: hydralora, gates: {gates}")
    export = merge(run, tmp_path / "out")
    assert export.exact and export.fidelity is not None
    assert abs(export.fidelity.kl_per_token) < 1e-5


def test_per_task_wants_a_task_and_all_makes_an_export_of_each(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="--task all"):
        merge(run, tmp_path / "out", ExportOptions(strategy="per_task"))
    (tmp_path / f".out.{2**22 + 7}-0badcafe.partial" / "first").mkdir(parents=True)  # what a kill leaves
    exports = merge_tasks(run, tmp_path / "out", ExportOptions(strategy="per_task"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert list(exports) == ["first", "last"]
    for name, export in exports.items():
        report = json.loads((tmp_path / "out" / name / "export_report.json").read_text(encoding="utf-8"))
        assert report["task"] == name and report["strategy"] == "per_task"
        assert set(report["tasks"]) == {name}
        assert (tmp_path / "out" / name / "model.safetensors").is_file() and export.updates.task == name


def test_one_task_is_fitted_better_by_its_own_rows(opened: OpenRun) -> None:
    rows = sample_rows(opened, 0)
    own = collect(opened.model, batches_of(opened, rows.calibration))
    all_rows = collect(opened.model, batches_of(opened, sample_rows(opened, None).calibration))
    layers = mixture_layers(opened.model)
    for name, moments in own.items():
        up = layers[name].columns("default").detach()
        fitted, general = (unexplained(moments, core_lsq.mixing(each), up) for each in (moments, all_rows[name]))
        assert fitted <= general + 1e-9


def test_what_a_static_update_misses_is_that_of_the_tokens_themselves(setting: StrategyInputs, opened: OpenRun) -> None:
    statics = {name: LowRank(torch.randn_like(s.down), s.up, 0.5) for name, s in closed_form(setting).items()}
    batches = batches_of(opened, sample_rows(opened, None).held_out)
    found = missed(opened.model, statics, batches)
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in statics}

    def add(name: str, layer: Any, x: Tensor, attended: Tensor) -> None:
        v = layer.rank_space(x, "default")[1][attended].double()
        wanted = layer.scaling("default") * v @ layer.columns("default").double().T
        given = x[attended].double() @ statics[name].dense().double().T
        sums[name] += torch.stack([(wanted - given).square().sum(), wanted.square().sum()])

    with torch.no_grad():
        for batch in batches:
            with observed(mixture_layers(opened.model), add, batch["attention_mask"].bool()):
                decode(opened.model, batch)
    for name, (error, total) in sums.items():
        assert found[name] == pytest.approx(float(error / total), rel=1e-4)


def test_tasks_add_up_to_the_whole_and_the_base_itself_agrees_with_itself(
    setting: StrategyInputs, opened: OpenRun
) -> None:
    batches = batches_of(opened, sample_rows(opened, None).held_out)
    whole = measure(opened.model, closed_form(setting), batches, ["first", "last"])
    parts = whole.tasks.values()
    for key in ("base", "routed", "merged", "kl_per_token", "agreement"):
        mean = sum(getattr(part, key) * part.tokens for part in parts) / sum(part.tokens for part in parts)
        assert mean == pytest.approx(getattr(whole, key), rel=1e-6)
    assert 0 < whole.agreement < 1
    routed = measure(opened.model, {}, batches)
    assert routed.agreement == 1 and routed.kl_per_token == 0 and not routed.tasks


def test_the_report_compares_both_bases_and_says_loudly_where_little_is_kept(run: Path, tmp_path: Path) -> None:
    export = merge(run, tmp_path / "out", ExportOptions(strategy="mean_gate", base="original"))
    report = json.loads((tmp_path / "out" / "export_report.json").read_text(encoding="utf-8"))
    assert set(report["bases"]) == {"dequantized", "original"}
    assert report["loss"] == report["bases"]["original"]["loss"] != report["bases"]["dequantized"]["loss"]
    assert report["bases"]["original"]["loss"]["routed"] == report["bases"]["dequantized"]["loss"]["routed"]
    assert {"making", "measuring"} == set(report["seconds"])
    assert all(0 <= task["greedy_agreement"] <= 1 for task in report["tasks"].values())
    fidelity = export.fidelity
    assert fidelity is not None
    object.__setattr__(fidelity, "base", fidelity.routed + 1)
    object.__setattr__(fidelity, "merged", fidelity.routed + 0.5)
    assert "keeps 50.0% of the gain (loss " in verdict(export)
    words = warning(export)
    assert words is not None and "distill" in words and "--task all" in words and "--to exact" in words
    object.__setattr__(fidelity, "merged", fidelity.routed)
    assert warning(export) is None


def test_a_run_on_unquantised_weights_has_one_base(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    text = (run / "recipe.yaml").read_text(encoding="utf-8").replace("/base}", "/base, quantization: none}")
    (run / "recipe.yaml").write_text(text, encoding="utf-8")
    opened = open_run(run, allow_changed=["base.quantization"])
    made = make_static(opened, "core_lsq")
    assert set(made.bases) == {"dequantized"} and "trained on it" in str(made.notes["original_base"])
