"""The recipe: everything a run depends on, typed and strict.

An unknown key is an error that names the nearest right one; a neighbour's name (`lora_r`, `cutoff_len`) is an error
that names ours. Nothing here looks at devices, models or data.
"""

from qd2mora.recipe.adapter import Adapter, Experts
from qd2mora.recipe.base import Base
from qd2mora.recipe.data import Data, Task
from qd2mora.recipe.loading import load_recipe, parse_recipe
from qd2mora.recipe.memory import Memory
from qd2mora.recipe.objective import Objective
from qd2mora.recipe.schema import Recipe
from qd2mora.recipe.train import Finish, Train

__all__ = [
    "Adapter",
    "Base",
    "Data",
    "Experts",
    "Finish",
    "Memory",
    "Objective",
    "Recipe",
    "Task",
    "Train",
    "load_recipe",
    "parse_recipe",
]
