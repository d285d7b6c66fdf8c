"""What the plan chooses for a budget, what it says where nothing fits, and how it reads."""

import io
import json
from typing import Any

import pytest
import torch
import yaml
from planned import CPU, PAPER, QKV, recipe_of
from rich.console import Console

from qd2mora.errors import InputRefused
from qd2mora.memory import Plan, parse_size, plan, render
from qd2mora.memory.choosing import predicted_cost
from qd2mora.memory.ledger import Setting
from qd2mora.recipe import Recipe, parse_recipe
from qd2mora.recipe_file import apply_override

GIB = 1 << 30
BUDGETS = [size * GIB // 4 for size in (18, 20, 21, 22, 24, 28, 32, 40, 64)]


def paper(max_length: int = 256, **sections: dict[str, Any]) -> Recipe:
    return recipe_of("random:llama2-7b", max_length=max_length, **sections)


def cost(planned: Plan, max_length: int) -> float:
    return predicted_cost(planned.setting, max_length, 32)


def changed(recipe: Recipe, override: str) -> Recipe:
    content = yaml.safe_load(recipe.dump_yaml())
    apply_override(content, override)
    return parse_recipe(content)


def printed(planned: Plan) -> str:
    console = Console(width=140, file=io.StringIO())
    with console.capture() as capture:
        console.print(render(planned))
    return capture.get()


def test_the_paper_fits_8_gib_and_not_3() -> None:
    fitting, short = plan(paper(), "8GiB"), plan(paper(), "3GiB")
    assert fitting.fits
    assert fitting.peak_bytes <= 8 * GIB == fitting.budget_bytes
    assert fitting.ways_out == ()
    assert not short.fits
    assert short.shortfall_bytes == short.peak_bytes - 3 * GIB > 0
    assert short.checkpointing
    assert 2 <= len(short.ways_out) <= 3
    assert "smaller base" in short.ways_out[-1]


def test_8_bit_moments_fit_the_paper_into_5_gib() -> None:
    assert plan(paper(train={"optimizer": "adamw_8bit"}), "5GiB").fits


@pytest.mark.parametrize("max_length", [64, 256, 1024, 4096])
def test_a_larger_budget_never_gives_a_slower_plan(max_length: int) -> None:
    plans = [plan(paper(max_length), budget) for budget in BUDGETS]
    assert [planned.fits for planned in plans] == sorted(planned.fits for planned in plans)
    costs = [cost(planned, max_length) for planned in plans if planned.fits]
    assert costs
    assert costs == sorted(costs, reverse=True)
    assert all(planned.peak_bytes <= planned.budget_bytes for planned in plans if planned.fits and planned.budget_bytes)


def test_a_plan_that_fits_is_the_fastest_of_all_that_do() -> None:
    settings = [(micro_batch, on) for micro_batch in (1, 2, 4, 8) for on in ("on", "off")]
    fixed = [
        plan(paper(512, train={"micro_batch": micro_batch}, memory={"checkpointing": on}), "80GiB")
        for micro_batch, on in settings
    ]
    for budget in BUDGETS:
        fitting = [cost(other, 512) for other in fixed if other.peak_bytes <= budget]
        chosen = plan(paper(512), budget)
        assert chosen.fits == bool(fitting)
        assert not fitting or cost(chosen, 512) == min(fitting)


def test_keeping_activations_is_faster_but_for_a_very_small_micro_batch() -> None:
    recomputing, keeping, one_row = (
        predicted_cost(Setting(micro_batch, recomputed, torch.bfloat16, True), 64, 32)
        for micro_batch, recomputed in ((8, 32), (8, 0), (1, 0))
    )
    assert keeping < recomputing < one_row


@pytest.mark.parametrize(("global_batch", "micro_batch"), [(16, 8), (12, 6), (7, 7), (5, 5), (22, 2), (13, 1)])
def test_without_a_budget_the_micro_batch_is_the_largest_divisor_up_to_8(global_batch: int, micro_batch: int) -> None:
    planned = plan(recipe_of(train={"global_batch": global_batch}), device=CPU)
    assert planned.micro_batch == micro_batch
    assert planned.budget_bytes is None
    assert planned.fits
    assert not planned.checkpointing


def test_without_a_budget_large_activations_are_recomputed() -> None:
    assert plan(paper(512), device=CPU).checkpointing
    assert not plan(paper(8, train={"micro_batch": 1}), device=CPU).checkpointing


@pytest.mark.parametrize("checkpointing", ["on", "off"])
@pytest.mark.parametrize("budget", ["3GiB", "80GiB"])
def test_what_the_recipe_sets_stays(checkpointing: str, budget: str) -> None:
    sections = {"train": {"micro_batch": 4}, "memory": {"checkpointing": checkpointing}}
    planned = plan(paper(base={"compute_dtype": "float16"}, **sections), budget)
    assert (planned.micro_batch, planned.checkpointing) == (4, checkpointing == "on")
    assert {choice.reason.partition(",")[0] for choice in planned.choices.values()} == {"as the recipe says"}


def test_the_budget_is_the_argument_then_the_recipe() -> None:
    recipe = paper(memory={"budget": "10GiB"})
    assert plan(recipe).budget_bytes == 10 * GIB
    assert plan(recipe, "6 GiB").budget_bytes == 6 * GIB
    assert plan(recipe, 5 * GIB, CPU).budget_bytes == 5 * GIB


def test_a_gpu_is_planned_in_16_bits_and_a_cpu_as_it_runs() -> None:
    elsewhere, here = plan(paper(), "80GiB"), plan(paper(), "80GiB", CPU)
    assert here.choices["base.compute_dtype"].value == "float32"
    assert elsewhere.choices["base.compute_dtype"].value in ("bfloat16", "float16")
    assert here.items["embeddings"] == 2 * elsewhere.items["embeddings"]
    assert "CUDA context" in elsewhere.items
    assert "CUDA context" not in here.items | here.elsewhere


@pytest.mark.parametrize(
    ("max_length", "sections", "budget"),
    [
        (1024, {"train": {"micro_batch": 8}}, "5.6GiB"),
        (512, {"memory": {"checkpointing": "off"}}, "6GiB"),
        (4096, {"base": {"double_quant": False}}, "6GiB"),
        (256, {"base": {"quantization": "none"}}, "8GiB"),
    ],
)
def test_every_way_out_called_enough_is_enough(max_length: int, sections: dict[str, Any], budget: str) -> None:
    recipe = paper(max_length, **sections)
    planned = plan(recipe, budget)
    assert not planned.fits
    enough = [words for words in planned.ways_out if words.endswith(", enough")]
    assert enough
    for words in enough:
        assert plan(changed(recipe, words.split(" saves ")[0]), budget).fits, words


def test_fewer_targets_are_offered_where_there_are_many() -> None:
    huge = {**PAPER, "rank": 256, "targets": "all-linear"}
    short = plan(paper(adapter=huge, train={"optimizer": "adamw_8bit", "micro_batch": 1}), "12GiB")
    assert any(words.startswith("adapter.targets=[q_proj,v_proj]") for words in short.ways_out)
    assert "way out: adapter.targets=[q_proj,v_proj]" in printed(short)


def test_the_json_has_what_others_read() -> None:
    content = json.loads(json.dumps(plan(paper(), "8GiB").to_json()))
    assert {"peak_bytes", "fits", "items", "choices", "budget_bytes", "shortfall_bytes", "ways_out"} <= set(content)
    assert content["peak_bytes"] == sum(content["items"].values())
    assert content["trainable_parameters"] == 45_617_664
    for choice in content["choices"].values():
        assert set(choice) == {"value", "reason"}


@pytest.mark.parametrize(
    ("budget", "verdict"), [("8GiB", "fits the budget of 8.00 GiB"), ("3GiB", "does not fit"), ("80GiB", "fits")]
)
def test_the_table_shows_every_item_the_peak_and_the_reasons(budget: str, verdict: str) -> None:
    planned = plan(paper(), budget)
    text = printed(planned)
    for name in (*planned.items, *planned.elsewhere, *planned.choices, *planned.ways_out):
        assert name in text
    assert f"{planned.peak_bytes / GIB:.2f} GiB" in text
    assert verdict in text


def test_the_table_of_a_run_without_a_budget_says_so() -> None:
    assert "no budget" in printed(plan(recipe_of(), device=CPU))


@pytest.mark.parametrize(
    ("text", "size"), [("8GiB", 8 * GIB), ("500 MB", 500_000_000), ("1.5GB", 1_500_000_000), ("512MiB", GIB // 2)]
)
def test_a_size_is_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "8", "8 gigs", "GiB", "-1GiB", "1e3MiB", "8GiB8", "8KiB", "٨GiB"])
def test_junk_for_a_size_is_refused(text: str) -> None:
    with pytest.raises(InputRefused, match="a number and a unit"):
        parse_size(text)


def test_a_target_that_matches_nothing_is_refused_before_anything_is_chosen() -> None:
    with pytest.raises(InputRefused, match="'c_attn' matches no linear"):
        plan(paper(adapter={**PAPER, "targets": [*QKV, "c_attn"]}), "8GiB")
