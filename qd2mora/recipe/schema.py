"""The recipe: everything a run depends on, typed and strict. Nothing here looks at devices, models or data."""

import json
from typing import Any

from pydantic import model_validator

from qd2mora.disk.file_hash import hash_of_bytes
from qd2mora.recipe.adapter import Adapter
from qd2mora.recipe.base import Base
from qd2mora.recipe.data import Data
from qd2mora.recipe.memory import Memory
from qd2mora.recipe.section import Place, Section
from qd2mora.recipe.train import HARMLESS, Finish, Train
from qd2mora.recipe.yaml_file import dump_yaml


class Recipe(Section):
    """A run, whole."""

    base: Base
    adapter: Adapter = Adapter()
    data: Data
    train: Train
    memory: Memory = Memory()
    finish: Finish = Finish()
    output: Place
    """The run folder."""

    @model_validator(mode="after")
    def _has_one_end(self) -> "Recipe":
        ends = [self.train.steps, self.train.epochs, self.data.stop]
        if sum(end is not None for end in ends) != 1:
            raise ValueError("give one of train.steps, train.epochs and data.stop")
        return self

    def dump_yaml(self) -> str:
        """Return the recipe as YAML that loads back equal."""
        return dump_yaml(self.model_dump(mode="json"))

    def deciding(self) -> dict[str, Any]:
        """Return the sections without the keys that leave the trained weights as they are."""
        content = self.model_dump(mode="json", exclude={"output": True, "memory": True, "finish": True})
        del content["base"]["cache"]
        is_judged = self.train.early_stopping is not None or self.train.final == "best"
        for key in HARMLESS:
            if not (is_judged and key == "eval_every"):
                del content["train"][key]
        # What is left open stays as runs from before it have it.
        for section, key in (("train", "rates"), ("train", "routing"), ("adapter", "core")):
            if content[section][key] is None:
                del content[section][key]
        for gate in (content["adapter"]["gates"] or {}).values():
            if gate["dropout"] is None:
                del gate["dropout"]
        for task in content["data"]["tasks"]:
            if not is_judged:
                del task["metric"]
            if task["turns"] is None:  # as runs from before it have it
                del task["turns"]
        return content

    def fingerprint(self) -> str:
        """Return a hash of everything that decides the trained weights."""
        return hash_of_bytes(json.dumps(self.deciding(), sort_keys=True).encode())


__all__ = ["Recipe"]
