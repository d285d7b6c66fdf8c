"""What a run depends on, field by field, so that a resume in a changed world is refused by name.

Places are left out: a base or a data file may move, as long as every byte of it is the same.
"""

import hashlib
import importlib.metadata
from collections.abc import Collection
from typing import TypedDict

from transformers import PreTrainedTokenizerBase

from qd2mora.adapter_folder import HEAD, WEIGHTS, base_identity
from qd2mora.data import TaskRows, content_hash, tokenizer_text
from qd2mora.disk.file_hash import hash_of_file
from qd2mora.disk.sealed import read_manifest as read_manifest_of
from qd2mora.errors import InputRefused
from qd2mora.mixture.start_folder import start_folder
from qd2mora.recipe import Recipe
from qd2mora.training.machine import machine_identity
from qd2mora.training.processes import Processes

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "tokenizers", "numpy", "qd2mora")

Identity = dict[str, object]


class Change(TypedDict):
    """What a resume was told to accept: fields with what they were and what they became, and from which step on."""

    step: int
    changed: dict[str, list[object]]


class Manifest(TypedDict):
    """What `manifest.json` of a run folder says."""

    identity: Identity
    lineage: list[Change]
    device: str
    threads: int
    clock: str
    plan: dict[str, object]


class Ancestry:
    """A run's identity as it becomes known, compared with the other processes' and with that of the run it continues.

    `before` is the manifest of the run that a resume continues, `allowed` the fields that may have changed since.
    """

    def __init__(self, before: Manifest | None, allowed: Collection[str], processes: Processes) -> None:
        self.before, self.allowed, self.processes = before, allowed, processes
        self.identity: Identity = {}
        self._changed: list[str] = []

    def add(self, fields: Identity) -> None:
        """Take more of the identity. Raises InputRefused where another process, or the run before, has another."""
        self.processes.refuse_other(fields)
        if self.before is not None:
            self._changed += refuse_changed(self.before["identity"], fields, self.allowed)
        self.identity |= fields

    def lineage(self, step: int) -> list[Change]:
        """Return the manifest's history: each change that a resume was told to accept."""
        if self.before is None:
            return []
        fields = {name: [self.before["identity"].get(name), self.identity[name]] for name in self._changed}
        if not fields:
            return self.before["lineage"]
        return [*self.before["lineage"], {"step": step, "changed": fields}]


def identity_of_inputs(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, tasks: list[TaskRows], processes: Processes
) -> Identity:
    """Return everything but the base's weights: recipe keys, versions, tokenizer, data, processes, machine, engine.

    `data.NAME` is the file; `rows.NAME` is what template and tokenizer made of it, in order, held-out rows too.
    """
    versions = {f"versions.{name}": importlib.metadata.version(name) for name in PACKAGES}
    files = {f"data.{task.name}": content_hash(task.path) for task in recipe.data.tasks}
    rows = {f"rows.{task.task.name}": _hash_of_rows(task) for task in tasks}
    where = {"device": processes.device.type, "processes": processes.count, "engine": recipe.memory.engine}
    where |= processes.from_main(lambda: machine_identity(processes.device))
    return _recipe_keys(recipe) | versions | where | {"tokenizer": tokenizer_hash(tokenizer)} | files | rows


def identity_of_start(recipe: Recipe) -> Identity:
    """Return the adapter that a run goes on from, by its content: the hash of its weights.

    Raises InputRefused where it was trained on another base, or another quantisation of it.
    """
    if recipe.adapter.start is None:
        return {}
    folder = start_folder(recipe.adapter.start)
    before = (read_manifest_of(folder) or {}).get("identity")
    if isinstance(before, dict):
        for name, value in base_identity(recipe.base).items():
            if before.get(name, value) != value:
                raise InputRefused(
                    f"adapter.start: '{recipe.adapter.start}' was trained on another {name} "
                    f"({_short(before[name])}, here {_short(value)})"
                )
    found: Identity = {"adapter.start.weights": hash_of_file(folder / WEIGHTS)}
    if recipe.objective.kind == "reward" and (folder / HEAD).is_file():
        found["adapter.start.head"] = hash_of_file(folder / HEAD)
    return found


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of a tokenizer: vocabulary, merges, added tokens, special ones, chat template."""
    return hashlib.sha256(tokenizer_text(tokenizer).encode()).hexdigest()


def refuse_changed(before: Identity, now: Identity, allowed: Collection[str]) -> list[str]:
    """Compare the fields of `now` with those a run began with; return the changed ones that are allowed.

    Raises InputRefused naming the first other one, what it was and what it is.
    """
    changed = [name for name in now if before.get(name, "absent") != now[name]]
    for name in changed:
        if name not in allowed:
            was, became = _short(before.get(name, "absent")), _short(now.get(name, "absent"))
            raise InputRefused(
                f"--resume: {name} changed since the run began ({was} became {became}); take it back, start anew, "
                f"or insist with --allow-changed {name}"
            )
    return changed


def _recipe_keys(recipe: Recipe) -> Identity:
    sections = recipe.deciding()
    # Places: the content of base and files is compared, so that they may move.
    del sections["base"]["model"]
    flat: Identity = {"data.tasks": [task["name"] for task in sections["data"]["tasks"]]}
    for task in sections["data"].pop("tasks"):
        del task["path"]
        if task["template"] is None:  # runs of before this could be left open say `tokenizer`; rows tell what was used
            del task["template"]
        if isinstance(task["validation"], str):  # a place too: what is in it counts as rows
            del task["validation"]
        flat |= {f"data.tasks.{task['name']}.{key}": value for key, value in task.items()}
    for section, keys in sections.items():
        for key, value in keys.items():
            nested = value if isinstance(value, dict) else {"": value}
            flat |= {f"{section}.{key}.{inner}".rstrip("."): entry for inner, entry in nested.items()}
    return flat


def _hash_of_rows(task: TaskRows) -> str:
    digest = hashlib.sha256()
    for rows in (task.train, task.validation):
        digest.update(f"{len(rows)};".encode())
        for row in rows:
            # Lengths stand before the tokens: without them, two ways to cut one stream into rows would look alike.
            digest.update(f"{len(row.ids)},{row.masked},{row.earlier};".encode())
            digest.update(row.ids.tobytes())
    return digest.hexdigest()


def _short(value: object) -> str:
    if isinstance(value, str) and len(value) == 64:  # a hash
        return value[:12]
    return repr(value)


__all__ = ["Ancestry", "Identity", "Manifest", "identity_of_inputs", "refuse_changed", "tokenizer_hash"]
