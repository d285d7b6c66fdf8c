"""What is asked of a comparison. Light to import: the command line takes its defaults from here."""

import json
from dataclasses import asdict, dataclass, field
from typing import Literal

Linears = Literal["own", "recipe"]


@dataclass(frozen=True)
class ComparisonSettings:
    """What is compared, how long, and what it is tested on.

    methods: the first is what the others are compared with. seeds: runs of each; 0 stops after the sweep. rates: the
    learning rates that every arm tries; the recipe's alone: no sweep. sweep_steps: of a run of the sweep, as many as of
    the others where None. minutes: time for all training that is left to do; steps follow from it, equal for all arms.
    choose_rows: rows of each task apart from training and test, to choose rate and export by. strategies: exports
    tried. export: score each run's best static export too. suite: test on its files in the folder `data`, of `tasks` or
    of all, not on the recipe's held-out rows; scoring and prompt: how it is asked (`evaluation.Exam`). limit: test rows
    of each task. targets: each method's own linears, or the recipe's for all. space: what is swept besides
    (`tuning.Setting`), with its values. tries: settings that every arm tries of all there are, by successive halving;
    all of them at full length where None. equal_time: train every arm once more for as long as the first one's steps
    take.
    """

    methods: tuple[str, ...] = ("d2mora", "lora", "hydralora")
    seeds: int = 3
    rates: tuple[float, ...] = ()
    sweep_steps: int | None = None
    minutes: float | None = None
    choose_rows: int = 100
    strategies: tuple[str, ...] = ()
    export: bool = True
    limit: int | None = None
    suite: str | None = None
    data: str | None = None
    tasks: tuple[str, ...] = ()
    scoring: str = "generate"
    prompt: str = "published"
    targets: Linears = "own"
    space: dict[str, tuple[float, ...]] = field(default_factory=dict)
    tries: int | None = None
    equal_time: bool = False

    def lasting(self) -> dict[str, object]:
        """Return what must stay the same for a comparison to go on; more seeds and more arms may be added."""
        content: dict[str, object] = json.loads(json.dumps(asdict(self)))
        for name in ("methods", "seeds", "minutes", "equal_time"):
            del content[name]
        # Comparisons of before there was a choice go on.
        if self.prompt == "published":
            del content["prompt"]
        return content


__all__ = ["ComparisonSettings"]
