"""The mixture in rank space, as pure functions of tensors.

Every method here is y_t = W x_t + b + s * B K_t A x_t. It is computed K first: one product u = A x, a step in rank
space z = K_t u, one product B z, so that no tensor of tokens x d_out is ever formed per expert.

Shapes: T tokens, D d_in, O d_out, R rank, M down experts, N up experts.
"""

from torch import Tensor


def chain_delta(
    x_TD: Tensor, A_MRD: Tensor, B_NOR: Tensor, router_down_MD: Tensor, router_up_NR: Tensor, scaling: float
) -> Tensor:
    """Return s * sum_j beta_j B_j sum_i alpha_i A_i x, shape (T, O), gates in float32 (D2MoRA, iLearn-Lab layer)."""
    num_down, rank, d_in = A_MRD.shape
    num_up, d_out, _ = B_NOR.shape
    u_TMR = (x_TD @ A_MRD.reshape(num_down * rank, d_in).T).unflatten(-1, (num_down, rank))
    gate_TM = (x_TD @ router_down_MD.T).float().softmax(-1).to(u_TMR.dtype)
    mixed_TR = (gate_TM.unsqueeze(-1) * u_TMR).sum(-2)
    gate_TN = (mixed_TR @ router_up_NR.T).float().softmax(-1).to(mixed_TR.dtype)
    z_TNR = gate_TN.unsqueeze(-1) * mixed_TR.unsqueeze(-2)
    return scaling * z_TNR.flatten(-2) @ B_NOR.permute(0, 2, 1).reshape(num_up * rank, d_out)


__all__ = ["chain_delta"]

