"""Names of linears that a configuration adapts, as PEFT matches them."""

import re

from torch import nn

from qd2mora.errors import InputRefused
from qd2mora.mixture.config import MixtureConfig


def patterns_of(targets: list[str] | str | None) -> dict[str, str]:
    """Return what each target matches: a list names the last parts of modules, a text is itself a pattern."""
    if targets == "all-linear":
        return {}
    if isinstance(targets, str):
        return {targets: targets}
    return {target: rf"(.*\.)?{re.escape(target)}" for target in targets or ()}


def refuse_unmatched(model: nn.Module, config: MixtureConfig) -> None:
    """Raise InputRefused where a target matches no linear, or no module where the method stands beside any."""
    is_beside_blocks = config.row.placement == "block"
    names = [name for name, module in model.named_modules() if is_beside_blocks or isinstance(module, nn.Linear)]
    for target, pattern in patterns_of(config.target_modules).items():
        # PEFT complains only where no target at all is found; one mistyped name would go unadapted.
        if not any(re.fullmatch(pattern, name) for name in names):
            there = sorted({name.rpartition(".")[2] for name in names})
            raise InputRefused(f"adapter.targets: '{target}' matches no linear; there are {', '.join(there)}")


__all__ = ["patterns_of", "refuse_unmatched"]
