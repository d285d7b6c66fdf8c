"""The Triton kernels against their plain twin, as a script: interpreted on a CPU (TRITON_INTERPRET=1), or on a GPU.

The interpreter must be asked for before Triton is imported, so this runs in a process of its own.
"""

import sys

import torch
from torch import Tensor

from qd2mora.mixture import MixtureConfig, MixtureLinear, Routing, kernels, mask_kernel, masks, rank_kernel
from qd2mora.routed.gate import Gate
from qd2mora.routed.ops import RankStep, wide

TOP = Gate(select="top_k", top_k=2, weight="renorm")
FROM_Z = Gate(input="z", temperature=0.5)
# down experts, up experts, rank, shared rank, gate of the down and of the up experts, paired
Case = tuple[int, int, int, int, Gate | None, Gate | None, bool]
CASES: list[Case] = [
    (3, 5, 6, 0, Gate(), Gate(input="z"), False),
    (3, 8, 8, 4, TOP, FROM_Z, False),
    (1, 3, 5, 0, None, Gate(), False),
    (4, 1, 7, 0, Gate(temperature=2.0), None, False),
    (5, 5, 3, 2, Gate(select="top_k", top_k=3, weight="softmax"), None, True),
    (3, 4, 5, 0, Gate(), Gate(select="top_k", top_k=1, weight="renorm", input="z"), False),
    (2, 6, 16, 1, Gate(), Gate(select="top_k", top_k=2, weight="softmax"), False),
]
COVERED = ("d2mora", "hydralora", "mola", "loramoe")


def check_step(
    case: tuple[int, int, int, int, Gate | None, Gate | None, bool], dtype: torch.dtype, device: str
) -> None:
    num_down, num_up, rank, shared, down, up, is_tied = case
    gates = tuple((role, gate) for role, gate in (("down", down), ("up", up)) if gate is not None)
    counts = {"down": num_down, "up": num_up}
    step = RankStep(
        ranks_down=(rank,) * num_down,
        ranks_up=(rank,) * num_up,
        pairing="tied" if is_tied else "chain",
        gates=gates,
        router_rows=tuple((role, counts[role]) for role, gate in gates if gate.reads_x),
        shared=shared,
        shared_scaling=0.7,
    )
    has_router = up is not None and up.input == "z"
    small = {"router_up": torch.randn(num_up, rank, device=device, requires_grad=True)} if has_router else {}
    u = torch.randn(2, 67, step.features, device=device).to(dtype)
    assert rank_kernel.covers(step, small, dtype)
    leaf = wide(u).detach().requires_grad_()
    wanted = step.mix(leaf, small)
    dv = torch.randn_like(wanted)
    wanted_grads = torch.autograd.grad(wanted, [leaf, *small.values()], dv)
    with torch.no_grad():
        alone = rank_kernel.mix(step, u, small)
        v, *grads = rank_kernel.through(step, u, small, dv)
    for got, right in zip([alone, v, *grads], [wanted, wanted, *wanted_grads], strict=False):
        # Both sum in float32; the sums of a router's gradient run over 134 tokens.
        torch.testing.assert_close(got, right, rtol=1e-5, atol=2e-5)


def check_layer(method: str, device: str) -> None:
    """A whole layer, forward and backward, with the kernels and without."""
    config = MixtureConfig(method=method, rank=4, alpha=8, allocation="4" if method == "mola" else None)
    linear = torch.nn.Linear(24, 20, device=device).requires_grad_(False)
    layer = MixtureLinear(linear, "default", config, Routing()).to(device)
    for tensor in layer.tensors("default").values():
        torch.nn.init.normal_(tensor, std=0.3)
    layer.eval()  # penalties on routing read the gates, which the kernels do not show
    x = torch.randn(2, 9, 24, device=device)

    def run(is_used: bool) -> list[Tensor]:
        kernels.runs_kernels = lambda u: is_used  # type: ignore[assignment]
        leaf = x.detach().requires_grad_()
        out = layer(leaf)
        trained = [tensor for tensor in layer.tensors("default").values() if tensor.requires_grad]
        return [out.detach(), *torch.autograd.grad((out * out).sum(), [leaf, *trained])]

    step, router = layer.mixture_spec["default"].step, layer.tensors("default").get("mixture_router_up")
    small = {} if router is None or "up" in step.places else {"router_up": router}
    assert rank_kernel.covers(step, small, x.dtype), method
    for got, right in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4)


def check_masks(width: int, dtype: torch.dtype, device: str) -> None:
    """Rows of a batch and of packed lines, one of them longer than a program's draws; equal to the bit."""
    rows = [(5 << 40 | 77, 0, 0, 3), ((1 << 63) - 1, 0, 3, 5), (9, 1, 2, 6)]
    wanted, made = (torch.ones(2, 9, width, dtype=dtype, device=device) for _ in range(2))
    masks.keep(wanted, rows, 4_000_000_000, 1003, 6554)
    mask_kernel.keep(made, torch.tensor(rows, device=device), 6, 4_000_000_000, 1003, 6554)
    assert torch.equal(made, wanted) and (made == 0).any() and (made[0, 8] == 1).all()


def main(device: str) -> None:
    torch.manual_seed(0)
    for width in (7, 24, 1031):
        for dtype in rank_kernel.DTYPES:
            check_masks(width, dtype, device)
    for case in CASES:
        check_step(case, torch.float32, device)
    check_step(CASES[0], torch.bfloat16, device)
    check_step(CASES[1], torch.float16, device)
    for method in COVERED:
        check_layer(method, device)
    print(f"{len(CASES) + 2} steps and {len(COVERED)} layers equal their twins on {device}")


if __name__ == "__main__":
    main(sys.argv[1])
