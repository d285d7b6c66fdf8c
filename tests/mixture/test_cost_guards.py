"""What the fast form costs at true 7B shapes, counted exactly on tensors without data: bytes, operations, dtypes.

Sizes of LLaMA-7B (4096, 11008), 1,024 tokens unless said otherwise, bfloat16 on NF4 with double quantisation.
"""

import pytest
import torch
from live_bytes import LiveBytes
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from true_size import (
    HIDDEN,
    MIB,
    TOKENS,
    Calls,
    adapted,
    addmm_flop,
    four_bit,
    num_bytes,
    penalty_operations,
    run_decoder_layer,
    run_linear,
    saved,
    settings,
)


def test_one_linear_keeps_u_alone() -> None:
    with FakeTensorMode():
        layer = adapted(four_bit(HIDDEN, HIDDEN), settings())
        x = torch.empty(1, TOKENS, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
        with saved([x, *layer.parameters()]) as kept:
            layer(x)
        assert [tensor.dtype for tensor in kept.values()] == [torch.bfloat16]
        assert num_bytes(kept) == TOKENS * (3 * 8 + 3) * 2 == 55_296


def test_one_linear_takes_no_more_than_its_output_and_the_dequantised_weight() -> None:
    peak = run_linear(settings(), LiveBytes).peak
    # x's gradient and y, 8 MiB each, W dense 32 MiB, the scales of its blocks, and rank space.
    assert peak <= 57.5 * MIB


@pytest.mark.parametrize("method", ["d2mora", "hydralora", "mola"])
def test_the_number_of_operations_depends_on_no_number_of_experts(method: str) -> None:
    counts = set()
    for down, up, rank in ((3, 8, 8), (4, 3, 16), (5, 4, 4), (8, 16, 4)):
        down = {"hydralora": 1, "mola": up}.get(method, down)
        counts.add(len(run_linear(settings(method, down, up, rank), Calls, 512).names))
    assert len(counts) == 1


# Upper ends: an operation more is a decision, not an accident.
@pytest.mark.parametrize(("method", "limit"), [("lora", 26), ("d2mora", 66), ("hydralora", 48), ("mola", 69)])
def test_a_linear_takes_so_many_operations(method: str, limit: int) -> None:
    one = {"lora": (1, 1), "hydralora": (1, 8)}.get(method, (8, 8) if method == "mola" else (3, 8))
    assert len(run_linear(settings(method, *one), Calls, 512).names) <= limit


def test_two_counts_of_the_same_are_equal() -> None:
    assert run_linear(settings(), Calls, 512).names == run_linear(settings(), Calls, 512).names


def test_the_products_of_a_mixture_cost_what_its_ranks_say() -> None:
    def flops() -> FlopCounterMode:
        # FlopCounterMode counts nothing for an addmm_ in place.
        return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flop})

    total = run_linear(settings(), flops).get_total_flops()
    frozen = 2 * 2 * TOKENS * HIDDEN * HIDDEN
    # u, dA, dx at 27 rows and y, dv, dB at 64 columns; the up router and its gradients in rank space.
    mixture = 3 * 2 * TOKENS * HIDDEN * (27 + 64) + 4 * 2 * TOKENS * 8 * 8
    assert frozen + mixture - 4 * 2 * TOKENS * 8 * 8 <= total <= frozen + mixture
    assert mixture < 0.04 * frozen


@pytest.mark.parametrize(("targets", "mib"), [("none", 128.7), ("qkv", 136.8), ("qkvud", 166.4), ("all", 166.6)])
def test_a_decoder_layer_keeps_so_many_bytes_and_float32_only_where_norms_do(targets: str, mib: float) -> None:
    _, by_dtype = run_decoder_layer(targets, TOKENS, backward=False)
    assert set(by_dtype) == {torch.bfloat16, torch.float32}
    # Each of the two norms keeps a float32 copy of its input; adapters add none.
    assert by_dtype[torch.float32] == run_decoder_layer("none", TOKENS, backward=False)[1][torch.float32]
    assert mib - 0.2 <= sum(by_dtype.values()) / MIB <= mib


@pytest.mark.parametrize(("targets", "mib"), [("none", 83.2), ("qkv", 91.3), ("qkvud", 120.9), ("all", 121.1)])
def test_a_lean_decoder_layer_keeps_a_quarter_less_and_a_float32_factor_a_token(targets: str, mib: float) -> None:
    _, by_dtype = run_decoder_layer(targets, TOKENS, backward=False, lean=True)
    assert by_dtype[torch.float32] == pytest.approx(TOKENS * 4 * (2 + 32), rel=0.01)  # norms, and attention's heads
    assert mib - 0.2 <= sum(by_dtype.values()) / MIB <= mib
    _, plain = run_decoder_layer(targets, TOKENS, backward=False)
    assert sum(by_dtype.values()) < 0.74 * sum(plain.values())


@pytest.mark.parametrize(("targets", "tokens", "mib"), [("qkv", 1024, 215), ("qkvud", 1024, 247), ("all", 4096, 724)])
def test_a_lean_decoder_layer_takes_so_many_bytes_at_its_peak(targets: str, tokens: int, mib: int) -> None:
    peak, _ = run_decoder_layer(targets, tokens, backward=True, lean=True)
    assert mib - 2 <= peak / MIB <= mib


@pytest.mark.parametrize(
    ("targets", "tokens", "mib"),
    [("qkv", 1024, 261), ("qkvud", 1024, 292), ("all", 1024, 292), ("qkvud", 4096, 905), ("all", 4096, 906)],
)
def test_a_decoder_layer_takes_so_many_bytes_at_its_peak(targets: str, tokens: int, mib: int) -> None:
    peak, _ = run_decoder_layer(targets, tokens, backward=True)
    assert mib - 2 <= peak / MIB <= mib


def test_the_penalty_of_a_7b_takes_no_more_operations_for_each_32_mib_than_for_two_layers() -> None:
    few, many = penalty_operations(2, 3), penalty_operations(32, 8)
    assert len(few) <= 250
    assert len(many) <= 4.5 * len(few)  # four shapes are 18 groups
