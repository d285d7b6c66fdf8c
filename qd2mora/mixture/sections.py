"""What is wrong with small parts of a configuration: routed cores, ranks, the expert that no gate touches, spans."""

from collections.abc import Mapping, Sequence
from typing import get_args

from qd2mora.errors import InputRefused, nearest
from qd2mora.mixture.method import Method, Penalty
from qd2mora.recipe.adapter import SharedInit
from qd2mora.routed.gate import Gates


def check_backend(given: Mapping[str, object], method: Method) -> None:
    """Refuse what PEFT's own implementation of a method does not have. Raises InputRefused."""
    for key, value in given.items():
        if value is not None and method.backend != "ours":
            raise InputRefused(f"adapter.{key}: {method.name} runs on PEFT's own implementation, which has none")


def check_core(core: Mapping[str, int] | None, method: Method) -> None:
    """Refuse cores that a method does not have, or none of them. Raises InputRefused."""
    if core is None:
        return
    if not method.cores:
        raise InputRefused(f"adapter.core: {method.name} has no routed cores; comol and residual_cores do")
    if set(core) != {"experts"} or core["experts"] < 1:
        raise InputRefused(f'adapter.core: {core} will not do: write {{"experts": 4}}')


def check_attention_rank(rank: int | None, method: Method) -> None:
    """Refuse a rank for linears with one expert where a method has none of those. Raises InputRefused."""
    if rank is None:
        return
    if not method.one_expert:
        raise InputRefused(f"adapter.attention_rank: {method.name} has experts in every linear; mixlora has not")
    if rank < 1:
        raise InputRefused(f"adapter.attention_rank: {rank} will not do: at least 1")


def check_experts(kind: str | None, method: Method, shared: Mapping[str, float | str] | None) -> None:
    """Refuse magnitudes where experts share one base output, and beside what no expert owns. Raises InputRefused."""
    if kind is None:
        return
    if kind != "dora":
        raise InputRefused(f"adapter.experts: unknown '{kind}'; dora, or leave it out")
    if method.placement != "mlp" or not method.one_expert:
        raise InputRefused(
            f"adapter.experts: dora scales the base's output of each expert, and those of {method.name} share one; "
            "mixlora's are whole MLPs"
        )
    if shared is not None:
        raise InputRefused("adapter.experts: dora has no place for adapter.shared, which is no expert's; leave one out")


def check_ranks(ranks: Sequence[int] | None, num_experts: int, method: Method) -> None:
    """Refuse ranks that are not one for each pair, or lack the base as an expert. Raises InputRefused."""
    if ranks is None:
        if method.has_public:
            raise InputRefused(f"adapter.ranks: {method.name} needs them, one for each expert: 0 first, the base's")
        return
    if method.pairing != "tied":
        raise InputRefused(f"adapter.ranks: {method.name} pairs any down with any up expert: one rank for all")
    new = ranks[1:] if method.has_public else ranks
    if len(ranks) != num_experts or min(new, default=0) < 1:
        raise InputRefused(f"adapter.ranks: {ranks} will not do: {num_experts} ranks, each at least 1")
    if method.has_public and ranks[0] != 0:
        raise InputRefused(
            f"adapter.ranks: {ranks} will not do: the first expert of {method.name} is the base, of rank 0"
        )


def check_shared(shared: Mapping[str, float | str] | None) -> None:
    """Refuse a shared expert of no rank, or of an unknown start. Raises InputRefused."""
    if shared is None:
        return
    if set(shared) - {"rank", "alpha", "init"} or int(shared.get("rank", 0)) < 1:
        raise InputRefused(f'adapter.shared: {shared} will not do: write {{"rank": 8, "init": "pissa"}}')
    init = str(shared.get("init", "kaiming"))
    if init not in get_args(SharedInit):
        raise InputRefused(f"adapter.shared.init: unknown '{init}'; {nearest(init, get_args(SharedInit))}")


def check_spans(penalties: Sequence[Penalty], routers: Gates, method: Method) -> None:
    """Refuse penalties that would count tokens outside of spans, and the contrast of gates that know no spans."""
    for kind in (each.kind for each in penalties):
        if (kind == "span_contrast") != routers.reads_spans:
            wanted = "a gate with input: span" if kind == "span_contrast" else "gates that are open at every token"
            raise InputRefused(f"adapter.penalties.{kind}: it needs {wanted}, and {method.name} has other ones")


__all__ = [
    "check_attention_rank",
    "check_backend",
    "check_core",
    "check_experts",
    "check_ranks",
    "check_shared",
    "check_spans",
]
