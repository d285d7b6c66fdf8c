"""The methods, one table row each.

Every method is y = W x + s B K_t A x and differs only in K_t: how the banks are paired, what lies between them, and
what the gates read. Sources name the public code each row was checked against.
"""

from dataclasses import dataclass
from typing import Literal

from qd2mora.errors import InputRefused, nearest

STATIC, TASK, TOKEN = "static", "task", "token"


@dataclass(frozen=True)
class Gate:
    """A router by what it reads; logits are linear in it, weights a float32 softmax over all experts.

    `x`: the linear's input, undropped. `z`: the mixed low-rank code. `task`: an embedding of the row's task.
    """

    input: Literal["x", "z", "task"]


@dataclass(frozen=True)
class Method:
    """One member of the family; numbers are defaults that a recipe may override where `fixed` does not forbid it."""

    name: str
    title: str
    equation: str
    source: str
    pairing: Literal["chain", "tied"] = "chain"
    core: Literal["none", "dense"] = "none"
    gate_down: Gate | None = None
    gate_up: Gate | None = None
    rank: int = 16
    alpha: float = 32.0
    down: int = 1
    up: int = 1
    penalty: float = 0.0
    scaling_rank: Literal["expert", "total"] = "expert"
    init_down: Literal["kaiming", "gaussian"] = "kaiming"
    task_embedding: int | None = None

    @property
    def depends_on(self) -> str:
        """What K depends on: `static` merges exactly, `task` exactly for one task, `token` only approximately."""
        gates = [gate for gate in (self.gate_down, self.gate_up) if gate]
        if not gates:
            return STATIC
        return TASK if all(gate.input == "task" for gate in gates) else TOKEN

    @property
    def num_routers(self) -> int:
        """Routers per linear."""
        return sum(gate is not None for gate in (self.gate_down, self.gate_up))


METHODS = {
    method.name: method
    for method in (
        Method(
            name="d2mora",
            title="D2MoRA: M down experts, N up experts, a router on each side",
            equation="alpha = softmax(R1 x); z = sum_i alpha_i A_i x; beta = softmax(R2 z); y += s sum_j beta_j B_j z",
            source="AAAI 2026; github iLearn-Lab/AAAI26-D2MoRA",
            gate_down=Gate("x"),
            gate_up=Gate("z"),
            down=4,
            up=3,
            penalty=1e-4,
        ),
        Method(
            name="lora",
            title="LoRA: one down, one up, no router",
            equation="y += s B A x",
            source="arXiv 2106.09685; github huggingface/peft",
            rank=64,
            alpha=128.0,
        ),
        Method(
            name="hydralora",
            title="HydraLoRA: one shared down expert, N routed up experts",
            equation="beta = softmax(R x); y += s sum_j beta_j B_j A x",
            source="arXiv 2404.19245; github Clin0212/HydraLoRA",
            gate_up=Gate("x"),
            rank=12,
            alpha=24.0,
            up=8,
        ),
        Method(
            name="moslora",
            title="MoSLoRA: LoRA with a learned r x r mixer between down and up",
            equation="y += s B C A x",
            source="arXiv 2406.11909; github wutaiqiang/MoSLoRA",
            core="dense",
            rank=64,
            alpha=128.0,
        ),
        Method(
            name="moelora",
            title="MOELoRA: paired experts gated by the task",
            equation="g = softmax(W_g e_task); y += s sum_e g_e B_e A_e x",
            source="arXiv 2310.18339; github liuqidong07/MOELoRA-peft",
            pairing="tied",
            gate_down=Gate("task"),
            rank=8,
            alpha=16.0,
            down=8,
            up=8,
            scaling_rank="total",
            init_down="gaussian",
            task_embedding=32,
        ),
    )
}


def find_method(name: str) -> Method:
    """Return a row of the table. Raises InputRefused naming the nearest one."""
    if name in METHODS:
        return METHODS[name]
    raise InputRefused(f"adapter.method: unknown method '{name}'; {nearest(name, METHODS)}")


def check_counts(method: Method, down: int, up: int) -> None:
    """Refuse expert counts that a method forbids. Raises InputRefused."""
    for bank, count, gate in (("down", down, method.gate_down), ("up", up, method.gate_up)):
        if method.pairing == "chain" and gate is None and count != 1:
            raise InputRefused(f"adapter.{bank}.experts: {method.name} has one {bank} expert, {count} given")
    if method.pairing == "tied" and down != up:
        raise InputRefused(f"adapter: {method.name} pairs its experts; down.experts {down} and up.experts {up} differ")


__all__ = ["METHODS", "STATIC", "TASK", "TOKEN", "Gate", "Method", "check_counts", "find_method"]
