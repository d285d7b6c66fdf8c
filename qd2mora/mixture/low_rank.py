"""A static update of one linear, s B A: what an export puts in the place of routing."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """s B A with `down` A (q, d_in) and `up` B (d_out, q), float32. With alpha = s q it is an ordinary LoRA of rank q.

    `base_change`: a_0 - 1 where a method scales its base as well: dense weights take (a_0 - 1) W too, a LoRA cannot.
    """

    down: Tensor
    up: Tensor
    scaling: float
    base_change: float = 0.0

    @property
    def rank(self) -> int:
        """q."""
        return self.down.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """Return both factors by name."""
        return {"static_down": self.down, "static_up": self.up}

    def dense(self) -> Tensor:
        """Return s B A, (d_out, d_in) float32, without the base's change."""
        return self.scaling * (self.up.float() @ self.down.float())

    def to(self, device: torch.device) -> "LowRank":
        """Return the same update on a device, float32."""
        return LowRank(self.down.float().to(device), self.up.float().to(device), self.scaling, self.base_change)


__all__ = ["LowRank"]
