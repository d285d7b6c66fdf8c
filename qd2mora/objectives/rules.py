"""What an answer is worth by a rule: the right words, a pattern, a length, or a Python file of the user's own.

A file is named on the command line alone: a recipe that came from elsewhere runs nobody's code.
"""

import importlib.util
import math
import re
from collections.abc import Callable
from pathlib import Path

from qd2mora.errors import InputRefused
from qd2mora.recipe.objective import Objective

Rule = Callable[[str, str, str], float]
"""The reward of a prompt, what was written after it, and the right answer of the data. Raises RewardError."""
FUNCTION = "reward"


class RewardError(ValueError):
    """A reward that cannot be had, and why."""


def rule_of(settings: Objective, file: Path | None) -> Rule:
    """Return a recipe's rule. Raises InputRefused where a file is wanted and not named, or the other way round."""
    if (settings.rule == "file") != (file is not None):
        raise InputRefused(
            f"--reward-file: goes with objective.rule: file, and that with it; the rule is {settings.rule or 'none'}"
        )
    if file is not None:
        return _checked(_function_of(file))
    if settings.rule == "regex":
        pattern = re.compile(settings.pattern or "")
        return lambda prompt, written, right: float(pattern.search(written) is not None)
    if settings.rule == "length":
        words = settings.words or 1
        return lambda prompt, written, right: 1 - min(1.0, abs(len(written.split()) - words) / words)
    return lambda prompt, written, right: float(written.split() == right.split())


def _function_of(file: Path) -> Callable[[str, str, str], object]:
    """Run a Python file; return its function `reward`. Raises InputRefused."""
    spec = importlib.util.spec_from_file_location("reward_file", file)
    if not file.is_file() or spec is None or spec.loader is None:
        raise InputRefused(f"--reward-file: '{file}' is no Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's own code raises is theirs to read, in one line
        raise InputRefused(f"--reward-file: '{file}' cannot be run: {type(error).__name__}: {error}") from error
    found = getattr(module, FUNCTION, None)
    if not callable(found):
        raise InputRefused(f"--reward-file: '{file}' defines no function {FUNCTION}(prompt, written, right)")
    reward: Callable[[str, str, str], object] = found
    return reward


def _checked(function: Callable[[str, str, str], object]) -> Rule:
    def reward(prompt: str, written: str, right: str) -> float:
        try:
            value = function(prompt, written, right)
        except Exception as error:  # see above
            raise RewardError(f"{type(error).__name__}: {error}") from error
        if isinstance(value, bool | int | float) and math.isfinite(value):
            return float(value)
        raise RewardError(f"{value!r} is no finite number")

    return reward


__all__ = ["RewardError", "Rule", "rule_of"]
