"""The recipe: everything a run depends on, typed and strict. Nothing here looks at devices, models or data."""

import json
from typing import Any

from pydantic import model_validator

from qd2mora.disk.file_hash import hash_of_bytes
from qd2mora.recipe.adapter import Adapter
from qd2mora.recipe.base import Base
from qd2mora.recipe.data import Data
from qd2mora.recipe.memory import Memory
from qd2mora.recipe.objective import KINDS, PREFERENCE, RATED, Objective
from qd2mora.recipe.section import Place, Section
from qd2mora.recipe.train import HARMLESS, Finish, Train
from qd2mora.recipe.yaml_file import dump_yaml


class Recipe(Section):
    """A run, whole."""

    base: Base
    adapter: Adapter = Adapter()
    data: Data
    objective: Objective = Objective()
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

    @model_validator(mode="after")
    def _learns_what_it_reads(self) -> "Recipe":
        kind, wanted = self.objective.kind, self.objective.needs.format
        for task in self.data.tasks:
            is_judged = task.format in (PREFERENCE, RATED)
            if wanted is not None and task.format != wanted:
                raise ValueError(f"objective: {kind} learns from format: {wanted}; task '{task.name}' is {task.format}")
            if wanted is None and is_judged:
                fitting = [name for name, needs in KINDS.items() if needs.format == task.format]
                raise ValueError(
                    f"task '{task.name}': {task.format} rows are for objective: {', '.join(fitting)}; {kind} learns "
                    "answers alone"
                )
        if wanted is not None and self.data.packing:
            raise ValueError(f"data.packing: {kind} judges answers as a whole, which shared lines hide; false")
        if wanted is not None and not self.data.mask_prompt:
            raise ValueError(f"data.mask_prompt: {kind} judges answers, and false counts prompts in; true")
        if kind == "kto" and self.train.global_batch < 2:
            raise ValueError("train.global_batch: kto reads a row's prompt with another row's answer; 2 or more")
        if self.adapter.start is not None and self.memory.engine != "none" and self.objective.reference is not None:
            raise ValueError(f"memory.engine: {kind} measures against adapter.start, which an engine shares out; none")
        if kind == "reward" and self.memory.engine != "none":
            raise ValueError(f"memory.engine: {self.memory.engine} shares out no head of objective: reward; none")
        if kind == "reward" and self.finish.export:
            raise ValueError("finish.export: an export has no place for the head of objective: reward; false")
        return self

    @property
    def tasks_over_experts(self) -> int | None:
        """How many tasks a head over experts tells apart; None where there is none."""
        return len(self.data.tasks) if self.objective.head == "experts" else None

    @model_validator(mode="after")
    def _knows_its_length(self) -> "Recipe":
        if self.tasks_over_experts is not None and self.adapter.start is None:
            raise ValueError(
                "objective.head: experts scores by those of a trained reward run; name it in adapter.start"
            )
        if self.objective.consolidate == "due" and self.train.steps is None:
            raise ValueError(
                "objective.consolidate: due tells as the run begins which rows it learns; give train.steps"
            )
        return self

    @model_validator(mode="after")
    def _writes_its_rows(self) -> "Recipe":
        if self.objective.kind != "grpo":
            return self
        if self.data.packing or not self.data.mask_prompt:
            raise ValueError("data: grpo learns its own answers, each as a whole; packing: false, mask_prompt: true")
        if self.memory.engine != "none":
            raise ValueError(f"memory.engine: {self.memory.engine} shares out what grpo writes answers with; none")
        if self.data.max_length <= (self.objective.max_new_tokens or 0):
            raise ValueError(
                f"objective.max_new_tokens: {self.objective.max_new_tokens} leave no room for a prompt within "
                f"data.max_length: {self.data.max_length}"
            )
        return self

    def dump_yaml(self) -> str:
        """Return the recipe as YAML that loads back equal."""
        return dump_yaml(self._content())

    def _content(self, *left_out: str) -> dict[str, Any]:
        content = self.model_dump(mode="json", exclude=set(left_out))
        if self.objective.is_sft:  # as runs from before there were others have it
            del content["objective"]
        return content

    def deciding(self) -> dict[str, Any]:
        """Return the sections without the keys that leave the trained weights as they are."""
        content = self._content("output", "memory", "finish")
        del content["base"]["cache"]
        is_judged = self.train.early_stopping is not None or self.train.final == "best"
        for key in HARMLESS:
            if not (key == "eval_every" and (is_judged or self.train.growth is not None)):
                del content["train"][key]
        # What is left open stays as runs from before it have it.
        for section, key in (
            ("train", "rates"),
            ("train", "routing"),
            ("train", "stages"),
            ("train", "growth"),
            ("adapter", "core"),
            ("adapter", "attention_rank"),
            ("adapter", "experts"),
            ("data", "spans"),
        ):
            if content[section][key] is None:
                del content[section][key]
        objective, routing = content.get("objective", {}), content["train"].get("routing", {})
        growth = content["train"].get("growth", {})
        for told, key, before in (
            (objective, "contrast", None),
            (objective, "consolidate", None),
            (objective, "kl", 0.0),
            (objective, "head", "linear"),
            (routing, "estimator", "rloo"),
            (growth, "ranks", None),
        ):
            if told.get(key) in (None, before):
                told.pop(key, None)
        _drop_what_gates_leave_open(content)
        for task in content["data"]["tasks"]:
            if not is_judged:
                del task["metric"]
            if task["turns"] is None:  # as runs from before it have it
                del task["turns"]
        return content

    def fingerprint(self) -> str:
        """Return a hash of everything that decides the trained weights."""
        return hash_of_bytes(json.dumps(self.deciding(), sort_keys=True).encode())


def _drop_what_gates_leave_open(content: dict[str, Any]) -> None:
    """Take out keys of gates and their course that say nothing, which runs from before them do not have."""
    routing = content["train"].get("routing", {})
    if routing.get("top_k") is None:
        for key in ("top_k", "top_k_steps", "low_layers_later"):
            routing.pop(key, None)
    for gate in (content["adapter"]["gates"] or {}).values():
        for key in ("dropout", "draws"):
            if gate[key] is None:
                del gate[key]


__all__ = ["Recipe"]
