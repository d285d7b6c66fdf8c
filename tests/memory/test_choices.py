"""What the plan chooses for a budget, what it says where nothing fits, and how it reads."""

import io
import json
import re
from itertools import product
from typing import Any

import pytest
import torch
import yaml
from planned import CPU, PAPER, QKV, recipe_of, shapes_of
from rich.console import Console

from qd2mora.errors import InputRefused
from qd2mora.memory import Plan, parse_size, plan, render
from qd2mora.memory.choosing import Search, predicted_cost
from qd2mora.memory.techniques import Case, Layout
from qd2mora.recipe import Recipe, parse_recipe
from qd2mora.recipe.yaml_file import apply_override

ELSEWHERE = torch.device("cuda")
GIB = 1 << 30
STAYING = {"activations": "none", "embeddings": "none", "weights": "none"}
PISSA = {"rank": 4, "init": "pissa"}
BUDGETS = [size * GIB // 4 for size in (18, 20, 21, 22, 24, 28, 32, 40, 64)]


def paper(max_length: int = 256, **sections: dict[str, Any]) -> Recipe:
    return recipe_of("random:llama2-7b", max_length=max_length, **sections)


def cost(planned: Plan, max_length: int) -> float:
    return predicted_cost(planned.layout, max_length, 32)


def changed(recipe: Recipe, override: str) -> Recipe:
    content = yaml.safe_load(recipe.dump_yaml())
    apply_override(content, override)
    return parse_recipe(content)


def printed(planned: Plan) -> str:
    console = Console(width=140, file=io.StringIO())
    with console.capture() as capture:
        console.print(render(planned))
    return capture.get()


def test_the_paper_fits_8_gib_and_not_1() -> None:
    fitting, short = plan(paper(), "8GiB"), plan(paper(), "1GiB")
    assert fitting.fits
    assert fitting.peak_bytes <= 8 * GIB == fitting.budget_bytes
    assert fitting.ways_out == ()
    assert not short.fits
    assert short.reserve_bytes == GIB // 8
    assert short.shortfall_bytes == short.peak_bytes + GIB // 8 - GIB > 0
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
    recipe = paper(512, train={"optimizer": "auto"})
    search = Search(Case(shapes_of(recipe), recipe, torch.bfloat16, on_gpu=True))
    techniques = [[False, True]] * 4
    every = [
        Layout(rows, layers, torch.bfloat16, True, chunk, "adamw_8bit" if small else "adamw", *places)
        for rows in (1, 2, 4, 8)
        for layers in range(0, 33, 4)
        for chunk in (1024, 256)
        for small, *places in product(*techniques)
        if layers or not places[0]
    ]
    costs = {setting: (search.cost(setting), search.peak(setting)) for setting in every}
    for budget in (GIB, 2 * GIB, *BUDGETS):
        fitting = [cost for cost, peak in costs.values() if peak <= budget]
        chosen, is_within = search.choose(budget)
        assert is_within == bool(fitting)
        assert not fitting or search.cost(chosen) <= min(fitting)


def test_a_budget_between_the_extremes_recomputes_some_layers_alone() -> None:
    planned = plan(paper(512, train={"micro_batch": 4}, memory={"offload": STAYING}), "10GiB")
    assert 0 < planned.layout.recomputed < 32
    assert planned.choices["memory.checkpointing"].value == planned.layout.recomputed
    assert "but for" in planned.choices["memory.checkpointing"].reason
    fewer = {"checkpointing": planned.layout.recomputed - 1, "offload": STAYING}
    assert not plan(paper(512, train={"micro_batch": 4}, memory=fewer), "10GiB").fits


def test_every_technique_that_is_used_says_what_the_plan_needs_without_it() -> None:
    planned = plan(paper(2048, train={"optimizer": "auto", "micro_batch": 1}), "2.3GiB")
    assert planned.fits
    used = {key: choice.reason for key, choice in planned.choices.items() if "without it" in choice.reason}
    assert {"train.optimizer", "memory.offload.weights"} <= used.keys()
    for key, reason in used.items():
        needed = re.search(r"without it this plan needs ([0-9.]+) GiB", reason)
        assert needed and float(needed[1]) >= 1.99, key


def test_a_large_budget_needs_no_technique() -> None:
    planned = plan(paper(256, train={"optimizer": "auto"}), "80GiB")
    assert planned.layout == Layout(8, 0, planned.layout.dtype, True)
    assert not planned.checkpointing


def test_beside_a_cpu_nothing_leaves() -> None:
    setting = plan(paper(2048), "6GiB", CPU).layout
    assert not (setting.offload_activations or setting.offload_embeddings or setting.stream)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"memory": {"checkpointing": "off", "offload": {"activations": "cpu"}}}, "checkpointing: off recomputes none"),
        (
            {"memory": {"offload": {"weights": "stream"}}, "adapter": {"method": "lora", "shared": PISSA}},
            "made of the frozen weights",
        ),
    ],
)
def test_what_cannot_be_combined_is_refused(sections: dict[str, Any], words: str) -> None:
    with pytest.raises(InputRefused, match=words):
        plan(paper(**sections), "8GiB")


def test_keeping_activations_is_faster_but_for_a_very_small_micro_batch() -> None:
    recomputing, keeping, one_row = (
        predicted_cost(Layout(micro_batch, recomputed, torch.bfloat16, True), 64, 32)
        for micro_batch, recomputed in ((8, 32), (8, 0), (1, 0))
    )
    assert keeping < recomputing < one_row


@pytest.mark.parametrize(("global_batch", "micro_batch"), [(16, 8), (12, 6), (7, 7), (5, 5), (22, 2), (13, 1)])
def test_without_a_budget_the_micro_batch_is_the_largest_divisor_up_to_8(global_batch: int, micro_batch: int) -> None:
    planned = plan(recipe_of(train={"global_batch": global_batch}), device=CPU)
    assert planned.micro_batch == micro_batch
    assert planned.fits
    assert not planned.checkpointing


def test_on_a_gpu_of_unknown_size_large_activations_are_recomputed() -> None:
    planned = plan(paper(512), device=ELSEWHERE)
    assert planned.checkpointing and planned.budget_bytes is None
    assert not plan(paper(8, train={"micro_batch": 1}), device=ELSEWHERE).checkpointing


def test_a_machine_without_a_gpu_is_planned_for_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qd2mora.memory.place.available_bytes", lambda: 22 * GIB)
    planned = plan(recipe_of())
    assert (planned.device, planned.budget_bytes, planned.checkpointing) == ("cpu", 22 * GIB, False)
    assert planned.choices["base.compute_dtype"].value == "float32" and not planned.host
    assert "CUDA context" not in planned.items | planned.elsewhere
    assert "planned for cpu" in printed(planned) and "fits what is free on this machine, 22.00 GiB" in printed(planned)
    huge = plan(paper(200_000))
    assert not huge.fits and "does not fit what is free on this machine" in printed(huge)


def test_free_memory_changes_what_is_recomputed_on_a_cpu_and_not_the_micro_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept, least = (
        plan(paper(512, memory={"checkpointing": word}), 800 * GIB, CPU).peak_bytes for word in ("off", "on")
    )
    for free, is_recomputed in ((1.1 * kept, False), (kept, True), (1.1 * least, True)):
        monkeypatch.setattr("qd2mora.memory.place.available_bytes", lambda free=free: int(free))
        planned = plan(paper(512), device=CPU)
        assert planned.fits and planned.micro_batch == 8
        assert planned.checkpointing == is_recomputed


def test_a_budget_without_a_device_is_that_of_a_gpu_which_is_said_not_to_be_here() -> None:
    planned = plan(paper(), "8GiB")
    if not torch.cuda.is_available():
        assert planned.device == "a GPU that is not here" and "planned for a GPU that is not here" in printed(planned)
        assert planned.choices["base.compute_dtype"].value == "bfloat16"
    assert plan(paper(), "80GiB", CPU).device == "cpu"


@pytest.mark.parametrize("size", [GIB // 2, 2 * GIB, 6 * GIB, 8 * GIB, 24 * GIB])
def test_a_plan_that_fits_leaves_a_reserve(size: int) -> None:
    planned = plan(paper(), size)
    assert planned.reserve_bytes == max(int(0.04 * size), min(256 << 20, size // 8))
    assert planned.fits == (planned.peak_bytes <= size - planned.reserve_bytes)


@pytest.mark.parametrize("checkpointing", ["on", "off"])
@pytest.mark.parametrize("budget", ["3GiB", "80GiB"])
def test_what_the_recipe_sets_stays(checkpointing: str, budget: str) -> None:
    memory = {"checkpointing": checkpointing, "loss_chunk": 300, "offload": STAYING, "accumulation": "micro_batch"}
    planned = plan(paper(base={"compute_dtype": "float16"}, train={"micro_batch": 4}, memory=memory), budget)
    assert planned.layout == Layout(4, 32 if checkpointing == "on" else 0, torch.float16, True, 300)
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
        (1024, {"train": {"micro_batch": 8}}, "2.4GiB"),
        (512, {"memory": {"checkpointing": "off"}}, "3GiB"),
        (512, {"memory": {"offload": STAYING}}, "4GiB"),
        (4096, {"memory": {"offload": {**STAYING, "weights": "stream"}}}, "3GiB"),
        (256, {"base": {"quantization": "none"}, "memory": {"offload": {"weights": "none"}}}, "8GiB"),
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
    ("budget", "verdict"), [("8GiB", "fits the budget of 8.00 GiB"), ("1GiB", "does not fit"), ("80GiB", "fits")]
)
def test_the_table_shows_every_item_the_peak_and_the_reasons(budget: str, verdict: str) -> None:
    planned = plan(paper(), budget)
    text = printed(planned)
    for name in (*planned.items, *planned.elsewhere, *planned.host, *planned.choices, *planned.ways_out):
        assert name in text
    assert f"{planned.peak_bytes / GIB:.2f} GiB" in text
    assert verdict in text


def test_the_table_of_a_run_without_a_budget_says_so() -> None:
    assert "no budget" in printed(plan(recipe_of(), device=ELSEWHERE))


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
