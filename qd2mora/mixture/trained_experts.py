"""What trained LoRAs decide of a mixture that is made of them: how many experts, their ranks, the linears."""

from typing import Any

from qd2mora.errors import InputRefused
from qd2mora.mixture.method import Method
from qd2mora.mixture.trained_loras import read_trained_loras
from qd2mora.recipe.adapter import Adapter


def experts_given(adapter: Adapter, row: Method) -> dict[str, Any]:
    """Return the settings that trained LoRAs decide: how many experts, their ranks, the linears."""
    if adapter.adapters is None:
        if row.given == "needed":
            raise InputRefused(f"adapter.adapters: {row.name} mixes trained LoRAs; name their folders")
        if not adapter.train_experts:
            raise InputRefused("adapter.train_experts: false goes with adapter.adapters: new experts must be trained")
        return {}
    if row.given == "no" or row.pairing != "tied":
        raise InputRefused(f"adapter.adapters: {row.name} does not take trained LoRAs; cat, xlora or meteora do")
    for key in ("rank", "ranks", "down", "up", "targets"):
        if getattr(adapter, key) is not None:
            raise InputRefused(f"adapter.{key}: the LoRAs of adapter.adapters decide it; leave it out")
    loras = read_trained_loras(list(adapter.adapters))
    ranks = [0] * row.has_public + [lora.rank for lora in loras]
    experts = {"experts": len(ranks)}
    targets = sorted(set().union(*(lora.targets for lora in loras)))
    return {"ranks": ranks, "rank": max(ranks), "down": experts, "up": experts, "targets": targets}


__all__ = ["experts_given"]
