"""Sub-MoE (arXiv 2506.23266) for low-rank experts: fewer experts of a smaller rank out of a trained mixture of pairs.

Experts whose updates point the same way are put together (agglomerative, by the cosine of B_e A_e). A group keeps one
up expert, the leading left singular vectors of [B_1 A_1 ... B_n A_n], and as its down expert the mean of what each had
in that basis, weighed by how often each is used (`expert_use`), as in the paper; without rows to measure that on, all
alike. All through QR of the factors: no matrix is ever d_out x d_in.

Of a softmax router the group's row is the same mean, and log n is added to its logit, so that n copies of one
expert become one without any loss. The result is a mixture of the same method with `score: bias`.
"""

from dataclasses import replace

import torch
from torch import Tensor

from qd2mora.errors import InputRefused
from qd2mora.mixture import MixtureConfig

Bank = tuple[Tensor, Tensor]


def refuse_unfit(config: MixtureConfig, experts: int, rank: int) -> None:
    """Refuse mixtures that are not pairs under one softmax router over x, and sizes that grow. Raises InputRefused."""
    gate = config.routers.get("down")
    if config.row.pairing != "tied" or config.row.core != "none" or config.ranks or config.shared or gate is None:
        raise InputRefused(f"sub: {config.method} is no mixture of plain pairs of one rank; loramoe and mola are")
    is_plain = gate.input == "x" and gate.score in ("linear", "bias") and gate.scope == "module"
    if not is_plain or gate.is_averaged or gate.weight not in ("softmax", "renorm") or gate.temperature != 1:
        raise InputRefused(f"sub: the router of {config.method} is no plain softmax over a token's x")
    if config.allocation is not None:
        raise InputRefused("sub: an allocation by depth gives layers different numbers of experts")
    if gate.select not in ("all", "top_k"):
        raise InputRefused(f"sub: {config.method} chooses experts by {gate.select}; all and top_k can be made smaller")
    if gate.select == "top_k" and (gate.top_k or 0) > experts:
        raise InputRefused(f"--experts: {experts} are fewer than the {gate.top_k} that a token uses")
    assert config.rank is not None
    for key, value, most in (("experts", experts, config.num_down), ("rank", rank, config.rank)):
        if not 1 <= value <= most:
            raise InputRefused(f"--{key}: {value} will not do: from 1 to the {most} there are")


def compressed_config(config: MixtureConfig, experts: int, rank: int) -> MixtureConfig:
    """Return the configuration of the smaller mixture, at the same scale s."""
    gates = dict(config.gates or {})
    # The bias holds log n of each group.
    gates["down"] = {**gates.get("down", {}), "score": "bias"}
    counts = {"experts": experts}
    return replace(
        config,
        rank=rank,
        alpha=config.scaling * rank_of_scale(config, experts, rank),
        gates=gates,
        down=counts,
        up=counts,
    )


def rank_of_scale(config: MixtureConfig, experts: int, rank: int) -> float:
    """Return what the smaller mixture divides alpha by."""
    total = float(rank)
    if config.row.scaling_rank == "total":
        total *= experts
    if config.rank_stabilized:
        return total**0.5
    return total


def compress(tensors: dict[str, Tensor], experts: int, rank: int, use_E: Tensor | None = None) -> dict[str, Tensor]:
    """Return one linear's tensors for fewer experts of a smaller rank; `use_E`: how much each expert is used."""
    # float64: QR and SVD of factors whose norms differ by much.
    A_ERD, B_EOR, router_ED = (tensors[f"mixture_{name}"].double() for name in ("A", "B", "router_down"))
    bias_E = tensors.get("mixture_bias_down", torch.zeros(len(A_ERD))).double()
    if use_E is None:
        use_E = torch.full((len(A_ERD),), 1 / len(A_ERD), dtype=torch.float64)
    downs, ups, rows, biases = [], [], [], []
    for group in grouped(A_ERD, B_EOR, experts):
        share = shares_of(use_E[group])
        down, up = merged(A_ERD[group], B_EOR[group], share, rank)
        downs.append(down)
        ups.append(up)
        rows.append(share @ router_ED[group])
        # Of n equal experts the merged one gets the sum of their softmax weights: log n is added to its logit.
        biases.append(bias_E[group].logsumexp(0))
    found = {"A": torch.stack(downs), "B": torch.stack(ups), "router_down": torch.stack(rows)}
    found["bias_down"] = torch.stack(biases)
    return {f"mixture_{name}": tensor.float() for name, tensor in found.items()}


def shares_of(use_E: Tensor) -> Tensor:
    """Return the shares of a group's experts, which sum to one; of experts that nobody uses, all alike."""
    if float(use_E.sum()) <= 0:
        return torch.full_like(use_E, 1 / len(use_E))
    return use_E / use_E.sum()


def grouped(A_ERD: Tensor, B_EOR: Tensor, num: int) -> list[list[int]]:
    """Return groups of experts: the two nearest by the mean cosine of their updates are joined until `num` are left."""
    # <B_e A_e, B_f A_f> = sum of (B_e^T B_f) * (A_e A_f^T).
    inner = torch.einsum("eor,fos,erd,fsd->ef", B_EOR, B_EOR, A_ERD, A_ERD)
    # Rounding may leave a zero expert's square below zero; 1e-300 gives it the cosine 0, not 0 / 0.
    norm = inner.diagonal().clamp_min(0).sqrt().clamp_min(1e-300)
    cosine = inner / torch.outer(norm, norm)
    groups = [[expert] for expert in range(len(A_ERD))]
    while len(groups) > num:
        pairs = [(a, b) for a in range(len(groups)) for b in range(a + 1, len(groups))]
        nearest = max(pairs, key=lambda pair: float(cosine[groups[pair[0]]][:, groups[pair[1]]].mean()))
        groups[nearest[0]] += groups.pop(nearest[1])
    return groups


def merged(A_ERD: Tensor, B_EOR: Tensor, share_E: Tensor, rank: int) -> Bank:
    """Return the pair (A (r, D), B (O, r)) that stands for a group, weighed by `share_E`, which sums to one."""
    # [B_1 A_1 ... B_n A_n] = Q_B (R_B blockdiag(A)) and A_e = L_e Q_e, so its left singular vectors are Q_B times those
    # of [R_1 L_1 ... R_n L_n], which is small.
    num, d_out, r = B_EOR.shape
    basis, triangle = torch.linalg.qr(B_EOR.permute(1, 0, 2).reshape(d_out, num * r))
    lower = [torch.linalg.qr(A.T)[1].T for A in A_ERD]
    parts = triangle.split(r, 1)
    small = torch.cat([part @ low for part, low in zip(parts, lower, strict=True)], 1)
    # Q_B has orthonormal columns, so that singular vectors of the small matrix are those of the large one in its basis.
    left = torch.linalg.svd(small, full_matrices=False)[0][:, :rank]
    # left^T R_e A_e is expert e in the group's basis.
    down = sum(share * (left.T @ part @ A) for share, part, A in zip(share_E, parts, A_ERD, strict=True))
    up = basis @ left
    if up.shape[1] < rank:  # fewer directions than ranks
        pad = rank - up.shape[1]
        return torch.nn.functional.pad(down, (0, 0, 0, pad)), torch.nn.functional.pad(up, (0, pad))
    return down, up


__all__ = ["compress", "compressed_config", "grouped", "merged", "refuse_unfit", "shares_of"]
