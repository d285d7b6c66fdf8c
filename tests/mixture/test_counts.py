"""Parameter counts on LLaMA-7B shapes, built on the meta device: the paper's Table 1, and every row's own formula."""

from collections.abc import Callable

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from qd2mora.base import SHAPES
from qd2mora.memory.shapes import read_shapes
from qd2mora.mixture import MixtureConfig, add_adapter, mixture_layers
from qd2mora.mixture.counts import llama_linears, trainable_parameters
from qd2mora.mixture.presets import METHODS

TABLE = [
    ("d2mora", 8, 3, 8, 35_788_800),
    ("d2mora", 16, 3, 4, 45_225_984),
    ("d2mora", 16, 4, 3, 45_617_664),
    ("lora", 64, 1, 1, 50_331_648),
    ("moslora", 64, 1, 1, 50_724_864),
    ("moelora", 8, 8, 8, 50_383_872),
    ("moelora", 16, 4, 4, 50_371_584),
    ("hydralora", 12, 1, 8, 45_613_056),
    ("hydralora", 16, 1, 6, 46_399_488),
]


def trained_on_a_7b(config: MixtureConfig, layers: int = 32) -> tuple[int, torch.nn.Module]:
    """Return the trained parameters of an adapted LLaMA-7B of so many layers, and the model."""
    shape = SHAPES["llama-7b"].config()
    shape.num_hidden_layers = layers
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape)
    adapted = get_peft_model(model, config, low_cpu_mem_usage=True)
    return sum(tensor.numel() for tensor in adapted.parameters() if tensor.requires_grad), adapted


@pytest.mark.parametrize(("method", "rank", "down", "up", "count"), TABLE)
def test_a_7b_has_as_many_trainable_parameters_as_the_paper_says(
    method: str, rank: int, down: int, up: int, count: int
) -> None:
    config = MixtureConfig(
        method=method,
        rank=rank,
        down={"experts": down},
        up={"experts": up},
        num_tasks=8 if method == "moelora" else None,
        target_modules=["q_proj", "k_proj", "v_proj"],
    )
    assert trained_on_a_7b(config)[0] == count


def test_dora_on_a_7b_trains_magnitudes_on_all_seven_linears_as_in_the_papers_table() -> None:
    config = MixtureConfig(method="dora", target_modules=["q_proj", "k_proj", "v_proj"])
    shape = SHAPES["llama-7b"].config()
    shape.num_hidden_layers = FEW
    with torch.device("meta"):
        model = add_adapter(AutoModelForCausalLM.from_config(shape), config, 0)
    trained = {name: tensor.numel() for name, tensor in model.named_parameters() if tensor.requires_grad}
    assert 8 * sum(trained.values()) == 51_691_520 == counted_from_sizes(config)
    alone = [name for name in trained if name.split(".")[6] in ("o_proj", "gate_proj", "up_proj", "down_proj")]
    assert len(alone) == 4 * FEW and all("magnitude" in name for name in alone)
    assert sum(trained.values()) == sum(read_shapes(shape, config).trainable)


D, F = 4096, 11008
FEW = 4
"""Layers of a 7B: an eighth of it, whose layers differ in nothing but MoLA's schedule, which goes by quarters."""
# d_in, d_out
LINEARS = {name: (D, D) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
LINEARS |= {"gate_proj": (D, F), "up_proj": (D, F), "down_proj": (F, D)}
QKV, MLP, ALL = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj", "down_proj"), tuple(LINEARS)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
Formula = Callable[[int, int], int]


def over(targets: tuple[str, ...], formula: Formula) -> int:
    """Sum a formula of d and o over the linears of 32 layers."""
    return 32 * sum(formula(*LINEARS[name]) for name in targets)


def paired(rank: int, num: int, router: Formula) -> Formula:
    return lambda d, o: num * rank * (d + o) + router(d, o)


def token_router(num: int) -> Formula:
    return lambda d, o: num * d


def mola() -> int:
    """Layers 0-7 have 2 experts of rank 8, 8-15 four, 16-23 six, 24-31 eight; a router row each."""
    per_expert = sum(8 * (d + o) + d for d, o in LINEARS.values())
    return 8 * (2 + 4 + 6 + 8) * per_expert


# Each row at its defaults, and what its formula counts there; tasks 8, a row's vector of 64.
FORMULAS: dict[str, tuple[tuple[str, ...], int]] = {
    # r d M + o r N + d M + r N, M 4, N 3, r 16
    "d2mora": (QKV, over(QKV, lambda d, o: 16 * d * 4 + o * 16 * 3 + d * 4 + 16 * 3)),
    "lora": (QKV, over(QKV, lambda d, o: 64 * (d + o))),
    "moslora": (QKV, over(QKV, lambda d, o: 64 * (d + o) + 64**2)),
    "hydralora": (QKV, over(QKV, lambda d, o: 12 * d + o * 12 * 8 + d * 8)),
    # cores 8 r^2 and a router 8 r in rank space
    "comol": ((*ATTENTION, "down_proj"), over((*ATTENTION, "down_proj"), lambda d, o: 16 * (d + o) + 8 * 256 + 8 * 16)),
    # diagonals 8 r; an MLP router of width 16 with one bias
    "mofme": (QKV, over(QKV, lambda d, o: 16 * (d + o) + 8 * 16 + 16 * 16 + 16 + 8 * 16)),
    # a router row for every rank; the selection bias is not trained
    "smora": (QKV, over(QKV, lambda d, o: 64 * (d + o) + 64 * d)),
    "mora": (QKV, over(QKV, lambda d, o: 32 * (d + o))),
    # a LoRA; 4 cores r^2 or 8 vectors r, and a router row in rank space for each
    "residual_cores": (QKV, over(QKV, lambda d, o: 32 * (d + o) + 4 * 32**2 + 4 * 32)),
    "residual_scales": (QKV, over(QKV, lambda d, o: 56 * (d + o) + 8 * 56 + 8 * 56)),
    # A is frozen
    "flylora": (ALL, over(ALL, lambda d, o: 32 * o)),
    # (tasks + 1) te + te E
    "moelora": (QKV, over(QKV, paired(8, 8, lambda d, o: 9 * 32 + 32 * 8))),
    "loramoe": (MLP, over(MLP, paired(4, 8, token_router(8)))),
    "mola": (ALL, mola()),
    "dynmole": (MLP, over(MLP, paired(24, 6, token_router(6)))),
    # three experts in the MLP under one router with a bias a block; one ungated expert in attention
    "llava_mole": (
        ALL,
        over(MLP, paired(32, 3, lambda d, o: 0)) + over(ATTENTION, lambda d, o: 32 * (d + o)) + 32 * (3 * D + 3),
    ),
    # beside the MLP, width D on both sides; two router halves
    "noisy_top_k": (("mlp",), 32 * (4 * 128 * 2 * D + 2 * 4 * D)),
    "lora_mixer": (ATTENTION, over(ATTENTION, paired(16, 4, token_router(4)))),
    "remix": (QKV, over(QKV, paired(8, 4, token_router(4)))),
    "meteora": (ALL, over(ALL, paired(64, 4, token_router(4)))),
    # experts frozen; a linear classifier of the hidden states with a bias for each linear
    "xlora": (QKV, over(QKV, lambda d, o: 2 * D + 2)),
    "cat": (QKV, over(QKV, lambda d, o: 2)),
    "rocket": (QKV, over(QKV, paired(16, 4, token_router(4)))),
    "reclora": (QKV, over(QKV, paired(8, 4, lambda d, o: 4 * 64))),
    # one seed; two kernels each of 4, 16, 36, 64; an embedding of 32 for 8 + 1 tasks and its router
    "ept": (QKV, over(QKV, lambda d, o: 8 * (d + o) + 2 * 120 + 9 * 32 + 8 * 32)),
    # four factors and the base's own
    "scalezero": (QKV, over(QKV, paired(16, 4, lambda d, o: 4 + 1))),
    "base_gate": (QKV, over(QKV, paired(16, 1, lambda d, o: d + 1))),
    "peam": (QKV, over(QKV, paired(16, 8, lambda d, o: 0))),
    "clora": (QKV, over(QKV, paired(16, 4, lambda d, o: 0))),
    "sketchassist": (QKV, over(QKV, paired(8, 4, lambda d, o: 4 * d + 9 * 32 + 4 * 32))),
}


def test_every_row_has_a_formula() -> None:
    elsewhere = {name for name, row in METHODS.items() if row.placement == "mlp" or row.backend == "peft"}
    assert set(FORMULAS) == set(METHODS) - elsewhere


@pytest.mark.parametrize("method", FORMULAS)
def test_an_eighth_of_a_7b_has_an_eighth_of_what_the_rows_formula_says(method: str) -> None:
    targets, count = FORMULAS[method]
    row = METHODS[method]
    assert sorted(row.targets) == sorted(targets)
    config = MixtureConfig(
        method=method,
        num_tasks=8 if row.gates.reads_task else None,
        external_width=64 if row.gates.reads_vector else None,
        target_modules=list(targets),
    )
    assert 8 * trained_on_a_7b(config, FEW)[0] == count == counted_from_sizes(config)


def counted_from_sizes(config: MixtureConfig) -> int:
    return trainable_parameters(config, llama_linears(D, F, D, D), 32, D)


@pytest.mark.parametrize(
    ("method", "count"),
    [
        # attention of rank 16 once, eight experts of rank 16 in the MLP, one router an MLP
        ("mixlora", over(ATTENTION, lambda d, o: 16 * (d + o)) + over(MLP, paired(16, 8, lambda d, o: 0)) + 32 * 8 * D),
        # ranks 0 + 4 + 8 + 16 + 32; one router among five an MLP
        ("flexmore", over(MLP, lambda d, o: 60 * (d + o)) + 32 * 5 * D),
    ],
)
def test_counting_from_sizes_alone_knows_experts_that_are_whole_mlps(method: str, count: int) -> None:
    config = MixtureConfig(method=method, target_modules=list(METHODS[method].targets))
    assert 8 * trained_on_a_7b(config, FEW)[0] == count == counted_from_sizes(config)


@pytest.mark.parametrize(
    ("allocation", "per_layer"),
    [("2-4-6-8", [2] * 8 + [4] * 8 + [6] * 8 + [8] * 8), ("8-2-2-8", [8] * 8 + [2] * 16 + [8] * 8), ("5", [5] * 32)],
)
def test_a_layer_has_the_experts_that_the_allocation_gives_it(allocation: str, per_layer: list[int]) -> None:
    config = MixtureConfig(method="mola", allocation=allocation, target_modules=["k_proj"])
    _, model = trained_on_a_7b(config)
    layers = mixture_layers(model)
    assert len(layers) == 32
    for name, layer in layers.items():
        number = per_layer[int(name.split(".")[2])]
        shapes = {key: tuple(tensor.shape) for key, tensor in layer.tensors("default").items()}
        assert shapes == {
            "mixture_A": (number, 8, D),
            "mixture_B": (number, D, 8),
            "mixture_router_down": (number, D),
        }


def test_equal_sums_of_experts_are_equal_counts_and_d2mora_takes_the_schedule_on_its_up_side() -> None:
    shapes = ("2-4-6-8", "8-6-4-2", "8-2-2-8", "5")
    counts = [
        trained_on_a_7b(MixtureConfig(method="mola", allocation=shape, target_modules=["q_proj"]), FEW)[0]
        for shape in shapes
    ]
    assert len(set(counts)) == 1
    config = MixtureConfig(allocation="2-8", target_modules=["q_proj"])
    _, model = trained_on_a_7b(config, FEW)
    ups = [layer.tensors("default")["mixture_B"].shape[0] for layer in mixture_layers(model).values()]
    assert ups == [2, 2, 8, 8]
