"""What a run learns of its rows: each objective a small file, by the kind that a recipe names."""

from collections.abc import Callable

from qd2mora.objectives.dpo import Dpo
from qd2mora.objectives.grpo import Grpo
from qd2mora.objectives.kto import Kto, mismatched
from qd2mora.objectives.objective import Measures, Objective, Said, told
from qd2mora.objectives.orpo import Orpo
from qd2mora.objectives.peam import Peam
from qd2mora.objectives.reference import Reference
from qd2mora.objectives.reward import Reward
from qd2mora.objectives.sft import Sft
from qd2mora.objectives.simpo import Simpo
from qd2mora.recipe.objective import Objective as Settings

OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "sft": Sft,
    "dpo": Dpo,
    "orpo": Orpo,
    "simpo": Simpo,
    "kto": Kto,
    "peam": Peam,
    "reward": Reward,
    "grpo": Grpo,
}
"""What makes each kind of its settings."""


def objective_of(settings: Settings) -> Objective:
    """Return a recipe's objective."""
    return OBJECTIVES[settings.kind](**settings.of_the_loss)


__all__ = ["OBJECTIVES", "Measures", "Objective", "Reference", "Said", "mismatched", "objective_of", "told"]
