"""How the bias of a selection moves with the use of experts: against it, so that all are used, or with it.

    bias_rate   d_e += rate sign(mean load - load_e)                     FlyLoRA's rule, with the mean count
    guidance    d_e = guidance log(E f_e),  f <- 0.99 f + 0.01 load      MoE-GRPO's guidance (arXiv 2603.24984)

The guidance is a log mask that is added to the scores which experts are drawn by: one that is used as often as others
keeps its score, one that is seldom used is drawn less. The paper tells it by modality and not by formula; a text is one
modality, so there is one running share f, which begins even. Both move once an update, by all its rows and draws.
"""

from torch import Tensor

from qd2mora.routed.gate import Gate

KEPT = 0.99
"""What an update leaves of the running share of use."""
LEAST = 0.01
"""Of an even share: what no expert falls below, so that each may still be found."""


def moved_bias(gate: Gate, bias_E: Tensor, load_E: Tensor) -> Tensor:
    """Return the bias (E,) after an update whose tokens used experts `load` times; the same where none was counted."""
    if gate.bias_rate:
        return bias_E + gate.bias_rate * (load_E.mean() - load_E).sign()
    # The share that the bias was made of: nothing but the bias itself has to be kept.
    share = (bias_E / gate.guidance).softmax(-1)
    share = KEPT * share + (1 - KEPT) * load_E / load_E.sum().clamp_min(1)
    moved: Tensor = gate.guidance * (share * len(share) / share.sum()).clamp_min(LEAST).log()
    return moved.where(load_E.sum() > 0, bias_E)


__all__ = ["moved_bias"]
