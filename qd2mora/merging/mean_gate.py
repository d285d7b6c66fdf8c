"""Mean gates: K becomes its average E[K_t]; for two banks the mean of the gates' product, not the means' product."""

from torch import Tensor

from qd2mora.merging.statistics import Moments


def mixing(moments: Moments) -> Tensor:
    """Return the static K, (N*r, M*r) float64."""
    return moments.mixing / max(1, moments.tokens)


__all__ = ["mixing"]
