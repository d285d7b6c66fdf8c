"""How an arm is tuned: the settings it may have, those of them that are tried, and how many of those are tried longer.

Every arm has the same budget: as many settings, the same steps. Settings are a Latin hypercube over what is swept, a
function of that alone, so that arms differ only where one has no router or core to give a rate of its own. Successive
halving (Jamieson and Talwalkar 2016): all are trained for a short while, the better half twice as long, and so on; each
from the start, because the learning rate's schedule depends on how long a training is.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from qd2mora.errors import InputRefused, nearest
from qd2mora.recipe import Adapter, Train
from qd2mora.recipe.train import Rates

PARTS = ("down", "up", "core", "router")
Space = Mapping[str, tuple[float, ...]]
"""What is swept: `rate` and what else a Setting has, each with the values to try; those that come first are tried."""


@dataclass(frozen=True)
class Setting:
    """What is tuned: the learning rate, multiples of it for parts of the adapter, a multiple of the arm's own scale."""

    rate: float
    down: float = 1.0
    up: float = 1.0
    core: float = 1.0
    router: float = 1.0
    alpha: float = 1.0
    dropout: float | None = None
    weight_decay: float | None = None

    @property
    def name(self) -> str:
        """The learning rate, then all that is not as it was."""
        plain = Setting(self.rate)
        changed = [each.name for each in fields(self) if getattr(self, each.name) != getattr(plain, each.name)]
        return "-".join([f"{self.rate:g}", *(f"{key}{getattr(self, key):g}" for key in changed)])

    def of_adapter(self, adapter: Adapter) -> Adapter:
        """Return the adapter at this setting."""
        changes: dict[str, Any] = {}
        if self.dropout is not None:
            changes["dropout"] = self.dropout
        if self.alpha != 1.0:
            assert adapter.alpha is not None
            changes["alpha"] = adapter.alpha * self.alpha
            # The whole update is scaled, and so the shared expert, which has a scale of its own.
            if adapter.shared is not None:
                of_shared = (adapter.shared.alpha or 2.0 * adapter.shared.rank) * self.alpha
                changes["shared"] = adapter.shared.model_copy(update={"alpha": of_shared})
        return adapter.model_copy(update=changes)

    def of_train(self, train: Train) -> Train:
        """Return the settings of training at this setting; rates of parts are multiples of those that are there."""
        changes: dict[str, Any] = {"learning_rate": self.rate}
        if self.weight_decay is not None:
            changes["weight_decay"] = self.weight_decay
        factors = {part: getattr(self, part) for part in PARTS}
        if any(factor != 1.0 for factor in factors.values()):
            own = train.rates or Rates()
            changes["rates"] = Rates(**{part: getattr(own, part) * factor for part, factor in factors.items()})
        return train.model_copy(update=changes)


SWEPT = tuple(each.name for each in fields(Setting))


@dataclass(frozen=True)
class Rung:
    """One round of halving: how long its settings were trained, and the loss of each, infinite where it diverged."""

    steps: int | None
    losses: dict[str, float]


@dataclass(frozen=True)
class Tuned:
    """The setting that was chosen, every round, and what it lies at the edge of: a wider sweep of that may help."""

    setting: Setting
    rungs: list[Rung] = field(default_factory=list)
    edges: tuple[str, ...] = ()

    @property
    def losses(self) -> dict[str, float]:
        """The loss of every setting that was tried, after the longest of its trainings."""
        return {name: loss for rung in self.rungs for name, loss in rung.losses.items()}


def checked_space(space: Mapping[str, object], where: str) -> dict[str, tuple[float, ...]]:
    """Return what is swept. Raises InputRefused."""
    found: dict[str, tuple[float, ...]] = {}
    for key, values in space.items():
        if key not in SWEPT:
            raise InputRefused(f"{where}: '{key}' is not swept; {nearest(key, SWEPT)}")
        listed: list[object] = values if isinstance(values, list) else [values]
        numbers = [float(each) for each in listed if isinstance(each, int | float) and not isinstance(each, bool)]
        if not listed or len(numbers) < len(listed) or not all(_will_do(key, each) for each in numbers):
            raise InputRefused(f"{where}.{key}: {values} will not do: numbers above 0, for example [1, 4, 16]")
        found[key] = tuple(dict.fromkeys(numbers))
    return found


def _will_do(key: str, value: float) -> bool:
    if key == "dropout":
        return 0 <= value < 1
    return math.isfinite(value) and (value > 0 or (key == "weight_decay" and value == 0))


def candidates(space: Space, tries: int | None) -> list[Setting]:
    """Return the settings to try: all there are, or `tries` of them, in which every value comes equally often."""
    number = math.prod(len(values) for values in space.values())
    if tries is None or tries >= number:
        return [Setting(**dict(zip(space, values, strict=True))) for values in itertools.product(*space.values())]
    generator = np.random.default_rng(0)
    found = {Setting(**{key: values[0] for key, values in space.items()}): None}
    while len(found) < tries:
        columns = {key: _balanced(values, tries, generator) for key, values in space.items()}
        for row in zip(*columns.values(), strict=True):
            found.setdefault(Setting(**dict(zip(columns, row, strict=True))), None)
    return list(found)[:tries]


def _balanced(values: Sequence[float], number: int, generator: np.random.Generator) -> list[float]:
    """Return the values over and over, `number` in all, in an order of chance."""
    repeated = [values[place % len(values)] for place in range(number)]
    return [repeated[place] for place in generator.permutation(number)]


def rungs_of(number: int, steps: int | None, is_halved: bool) -> list[tuple[int, int | None]]:
    """Return of each round how many settings are trained for how many steps; the last round's are `steps`."""
    if number < 2:
        return []
    if not is_halved or steps is None:
        return [(number, steps)]
    # The last round is of two or three: it decides between settings at full length, and never just confirms one.
    rounds = max(1, int(math.log2(number)))
    return [(max(1, number >> place), max(2, steps >> (rounds - 1 - place))) for place in range(rounds)]


def tuned(
    space: Space,
    tries: int | None,
    steps: int | None,
    losses: Callable[[Setting, int | None], float],
) -> Tuned:
    """Return the best setting by halving; `losses` trains a setting for so many steps, and returns its loss."""
    left = candidates(space, tries)
    rungs = []
    for number, each in rungs_of(len(left), steps, tries is not None):
        # Python's sort is stable: of equal losses the first one tried stays.
        left = left[:number]
        found = {setting: losses(setting, each) for setting in left}
        rungs.append(Rung(each, {setting.name: loss for setting, loss in found.items()}))
        left = sorted(left, key=lambda setting: found[setting])
    best = left[0]
    if rungs and not math.isfinite(rungs[-1].losses[best.name]):
        raise InputRefused("--sweep: no setting that was tried gave a finite loss; lower learning rates")
    return Tuned(best, rungs, tuple(_edges(best, space)))


def trainings_worth(number: int, is_halved: bool) -> float:
    """Return how many of the longest trainings the rounds of so many settings take."""
    rungs = rungs_of(number, 1 << 30, is_halved)
    return sum(count * (steps or 0) for count, steps in rungs) / (1 << 30)


def _edges(best: Setting, space: Space) -> list[str]:
    """Return what the best setting has the smallest or the largest value of, where there were others between."""
    # Of two values either is an edge: that tells something of a learning rate alone.
    swept = {key: values for key, values in space.items() if len(values) > (1 if key == "rate" else 2)}
    return [key for key, values in swept.items() if getattr(best, key) in (min(values), max(values))]


def widened(space: Space, rate: float) -> dict[str, tuple[float, ...]]:
    """Return what is swept with a learning rate in it, the recipe's where none is swept."""
    return {"rate": tuple(space.get("rate", (rate,))), **{key: each for key, each in space.items() if key != "rate"}}


__all__ = [
    *("SWEPT", "Rung", "Setting", "Space", "Tuned"),
    *("candidates", "checked_space", "rungs_of", "trainings_worth", "tuned", "widened"),
]
