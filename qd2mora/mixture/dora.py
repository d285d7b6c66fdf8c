"""DoRA on PEFT's own implementation: W' = m (W + s B A) / |W + s B A|_row, the norm out of the graph.

Source: arXiv 2402.09353; huggingface/peft. As in the authors' code (NVlabs/DoRA) and in D2MoRA's Table 1, linears
beside the targets have a magnitude alone, W' = m W / |W|_row. PEFT knows none without a LoRA, so they have one of rank
1 that is zero and stays so: stock PEFT loads the adapter, and what is trained is the magnitude.
"""

import re

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from qd2mora.mixture.config import MixtureConfig
from qd2mora.mixture.targets import patterns_of


def magnitudes_alone(model: nn.Module, config: MixtureConfig) -> list[str]:
    """Return the kinds of linears that get a magnitude and no LoRA: those of the row that are there and no targets.

    A kind that the targets take in some layers gets none in the others.
    """
    patterns = list(patterns_of(config.target_modules).values())
    if not patterns:
        return []  # all linears are targets
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    taken = {name.rpartition(".")[2] for name in names if any(re.fullmatch(pattern, name) for pattern in patterns)}
    there = {name.rpartition(".")[2] for name in names}
    return [kind for kind in config.row.magnitudes if kind in there - taken]


def dora_config(model: nn.Module, config: MixtureConfig) -> LoraConfig:
    """Return PEFT's configuration of a DoRA on this model."""
    assert config.rank is not None and config.alpha is not None
    alone, targets = magnitudes_alone(model, config), config.target_modules
    if alone and isinstance(targets, str):
        targets = rf"({targets})|((.*\.)?({'|'.join(alone)}))"
    elif alone:
        targets = [*(targets or ()), *alone]
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # PEFT divides by the rank alone
        lora_dropout=config.dropout,
        use_rslora=config.rank_stabilized,
        use_dora=True,
        target_modules=targets,
        rank_pattern=dict.fromkeys(alone, 1),
        exclude_modules=config.exclude_modules,
        task_type=config.task_type,
    )


def freeze_beside_magnitudes(adapted: PeftModel, kinds: list[str], adapter_name: str = "default") -> None:
    """Freeze the LoRA of the linears that have it for their magnitude's sake."""
    for name, module in adapted.named_modules():
        if isinstance(module, LoraLayer) and name.rpartition(".")[2] in kinds:
            for bank in (module.lora_A, module.lora_B):
                bank[adapter_name].requires_grad_(False)


__all__ = ["dora_config", "freeze_beside_magnitudes", "magnitudes_alone"]
