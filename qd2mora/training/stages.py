"""Stages of a run: which part of the adapter is trained in which steps.

Which stage a step is in is a function of its number, so that a resume stands in the right one. What a stage leaves out
loses its gradients before the update: no optimiser touches a tensor without one, decayed weights and moments included,
so that it stays bit for bit. It is passed through all the same: a stage saves no time and no memory.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from qd2mora.errors import InputRefused
from qd2mora.mixture.parts import part_of
from qd2mora.recipe import Recipe

KEY = "train.stages"


@dataclass(frozen=True)
class Stages:
    """What is trained, stage by stage, and the update (from 0) that each ends before; nothing: all, throughout."""

    trained: tuple[str, ...] = ()
    ends: tuple[int, ...] = ()

    @classmethod
    def of(cls, recipe: Recipe, total: int) -> "Stages":
        """Return a run's stages. Raises InputRefused where they are not as long as the run of `total` updates."""
        told = recipe.train.stages
        if told is None:
            return cls()
        given = [stage.steps for stage in told if stage.steps is not None]
        left, num_open = total - sum(given), len(told) - len(given)
        if left < num_open or (left and not num_open):
            raise InputRefused(
                f"{KEY}: {sum(given)} steps are given to {len(given)} of {len(told)} stages, and the run has {total}; "
                "leave steps out of a stage that takes what is left, or lower them"
            )
        lengths, opened = [], 0
        for stage in told:
            if stage.steps is None:
                # Whole numbers that add up to what is left, whatever the number of stages.
                lengths.append(left * (opened + 1) // num_open - left * opened // num_open)
                opened += 1
            else:
                lengths.append(stage.steps)
        ends = tuple(sum(lengths[: place + 1]) for place in range(len(lengths)))
        return cls(tuple(stage.train for stage in told), ends)

    def number(self, update: int) -> int:
        """Return which stage update number `update` is in, from 0."""
        return sum(end <= update for end in self.ends[:-1])

    def is_trained(self, parameter: str, update: int) -> bool:
        """Tell whether a parameter is trained in an update; what is no router counts as an expert."""
        if not self.trained:
            return True
        told, part = self.trained[self.number(update)], part_of(parameter)
        if told == "cores":
            return part == "core"
        return told == "all" or (told == "routers") == (part == "router")

    def moves_routers(self, update: int) -> bool:
        """Tell whether routers change in an update, the selection biases that nothing trains included."""
        return not self.trained or self.trained[self.number(update)] in ("routers", "all")

    def freeze(self, parameters: dict[str, nn.Parameter], update: int) -> None:
        """Take the gradients of what this update leaves as it is."""
        for name, parameter in parameters.items():
            if not self.is_trained(name, update):
                parameter.grad = None

    def refuse_idle(self, parameters: Iterable[str], has_trained_start: bool) -> None:
        """Refuse a stage that has nothing to train. Raises InputRefused."""
        names = list(parameters)
        for number, (told, end) in enumerate(zip(self.trained, self.ends, strict=True)):
            if not any(self.is_trained(name, end - 1) for name in names):
                raise InputRefused(f"{KEY}.{number}.train: {told}, but this adapter trains none; leave the stage out")
        if self.trained[:1] == ("routers",) and not has_trained_start:
            raise InputRefused(
                f"{KEY}.0.train: routers of a fresh adapter have nothing to choose among, as its experts are zero; "
                "experts first, or name adapter.start"
            )

    def words(self) -> Iterator[str]:
        """Yield of each stage what is trained in which steps."""
        for number, (told, end) in enumerate(zip(self.trained, self.ends, strict=True)):
            yield f"{told} in steps {self.ends[number - 1] + 1 if number else 1} to {end}"

    def news(self, update: int) -> str:
        """Say what begins with an update; nothing where the stage goes on."""
        if update not in self.ends[:-1]:
            return ""
        told = self.trained[self.number(update)]
        rest = {"experts": ", routers stay as they are", "routers": ", experts stay as they are", "all": ""}
        rest["cores"] = ", all else stays as it is"
        return f"step {update + 1}: from here on {told} are trained{rest[told]}".replace("all are", "all is")


__all__ = ["Stages"]
