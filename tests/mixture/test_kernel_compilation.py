"""The kernels compile ahead of time for every card since Turing, and keep within its registers and shared memory."""

import importlib.util
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

from qd2mora.mixture.kernels import OPTIONS
from qd2mora.routed.gate import Gate
from qd2mora.routed.ops import RankStep

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")

SOFT, READS_Z = Gate(), Gate(input="z")
BEST_TWO = Gate(select="top_k", top_k=2, weight="renorm")
STEPS = {
    "d2mora M4 N3 r16": RankStep(
        (16,) * 4, (16,) * 3, gates=(("down", SOFT), ("up", READS_Z)), router_rows=(("down", 4),)
    ),
    "d2mora M3 N8 r8": RankStep(
        (8,) * 3, (8,) * 8, gates=(("down", SOFT), ("up", READS_Z)), router_rows=(("down", 3),)
    ),
    "hydralora N8 r12": RankStep((12,), (12,) * 8, gates=(("up", SOFT),), router_rows=(("up", 8),)),
    "mola 8 of r8": RankStep(
        (8,) * 8, (8,) * 8, pairing="tied", gates=(("down", BEST_TWO),), router_rows=(("down", 8),)
    ),
    "with a shared expert of r64": RankStep(
        (16,) * 4, (16,) * 3, gates=(("down", SOFT), ("up", READS_Z)), router_rows=(("down", 4),), shared=64
    ),
}
SHARED_MEMORY = {75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}
"""Bytes that a block may have, by compute capability (CUDA's programming guide, table of technical specifications)."""
MOST_REGISTERS = 255
CARDS = [75, 86, pytest.param(80, marks=pytest.mark.long), 89, 90]


def compiled(kernel: Any, step: RankStep, features: str, is_backward: bool, capability: int) -> Any:
    """Compile a kernel of the step in rank space for a card that is not here."""
    from qd2mora.mixture import rank_kernel

    pointers = {"u_ptr": f"*{features}", "router_ptr": "*fp32", "v_ptr": "*fp32", "T": "i32"}
    if is_backward:
        pointers |= {"dv_ptr": "*fp32", "du_ptr": "*fp32", "drouter_ptr": "*fp32"}
    return built(kernel, pointers, rank_kernel._KernelConstants.of(step).constants, capability)


def built(kernel: Any, kinds: dict[str, str], constants: dict[str, Any], capability: int) -> Any:
    """Compile a kernel whose arguments are of these kinds, for a card that is not here."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: kinds.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if kinds.get(name, "").startswith("*")
    }
    given = {name: value for name, value in constants.items() if name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=given, attrs=aligned)
    # What a launch is told besides stands among its constants.
    options = {"num_warps": 4, **OPTIONS} | {name: constants[name] for name in constants.keys() - given.keys()}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def assert_within(made: Any, capability: int) -> None:
    used = usage(made)
    assert used["registers"] <= MOST_REGISTERS
    assert used["stack"] == used["local"] == 0
    assert made.metadata.shared <= SHARED_MEMORY[capability]


def usage(made: Any) -> dict[str, int]:
    """Return registers a thread, and bytes of stack and local memory, into which registers spill."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", done.stdout + done.stderr)
    assert found is not None, done.stdout
    return dict(zip(("registers", "stack", "local"), map(int, found.groups()), strict=True))


@pytest.mark.parametrize("capability", CARDS)
@pytest.mark.parametrize("name", STEPS)
def test_kernels_compile_without_spills_for_cards_that_are_not_here(name: str, capability: int) -> None:
    from qd2mora.mixture import rank_kernel

    features = "fp16" if capability < 80 else "bf16"
    for kernel, is_backward in ((rank_kernel._forward, False), (rank_kernel._backward, True)):
        assert_within(compiled(kernel, STEPS[name], features, is_backward, capability), capability)


@pytest.mark.parametrize("capability", CARDS)
@pytest.mark.parametrize("width", [128, 4096, 16384])
def test_norms_compile_without_spills(width: int, capability: int) -> None:
    from qd2mora.memory import lean_kernel

    kind = "*fp16" if capability < 80 else "*bf16"
    shared = {"x_ptr": kind, "weight_ptr": kind, "factor_ptr": "*fp32"}
    there, back = shared | {"out_ptr": kind, "eps": "fp32"}, shared | {"dy_ptr": kind, "dx_ptr": kind}
    constants = lean_kernel.norm_constants(width, "rounded first")
    assert_within(built(lean_kernel._norm, there, constants, capability), capability)
    assert_within(built(lean_kernel._norm_back, back, constants, capability), capability)


@pytest.mark.parametrize("capability", CARDS)
@pytest.mark.parametrize("is_gelu", [False, True])
def test_gated_products_and_masks_compile_without_spills(is_gelu: bool, capability: int) -> None:
    from qd2mora.memory import lean_kernel
    from qd2mora.mixture import mask_kernel

    kind = "*fp16" if capability < 80 else "*bf16"
    kinds = dict.fromkeys(("dy_ptr", "gate_ptr", "up_ptr", "dgate_ptr", "dup_ptr", "out_ptr"), kind)
    kinds |= dict.fromkeys(("gate_stride", "up_stride", "D"), "i32")
    constants = {"GELU": is_gelu, "BLOCK": lean_kernel.BLOCK}
    for kernel in (lean_kernel._gated, lean_kernel._gated_back):
        assert_within(built(kernel, kinds, constants, capability), capability)
    numbers = dict.fromkeys(("T", "D", "layer", "purpose", "dropped"), "i32")
    masks = {"out_ptr": kind, "rows_ptr": "*i64", "scale": "fp32", **numbers}
    assert_within(built(mask_kernel._keep, masks, {"DRAWS": mask_kernel.DRAWS}, capability), capability)
