"""Whole runs on the card that is not there, in a process of their own: `python runs.py FOLDER CASE...`.

A line of JSON a case: losses, and where the host waited; or the error.
"""

import json
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import guard

IS_BUILT = guard.load()

import card  # noqa: E402

card.add_paths()

import tiny  # noqa: E402
import torch  # noqa: E402

import qd2mora.training.run as run_module  # noqa: E402
from qd2mora.memory import streaming  # noqa: E402
from qd2mora.memory.choosing import Search  # noqa: E402
from qd2mora.recipe import load_recipe  # noqa: E402
from qd2mora.training import train  # noqa: E402


@dataclass(frozen=True)
class Case:
    """One run: the recipe's overrides."""

    overrides: list[str] = field(default_factory=list)
    tied: bool = True
    bfloat16: bool = True
    layers: int = 2
    stays: bool = True
    """Whether streamed layers stay on the card where there is room, as on this one there is."""


METRICS = ["data.tasks.0.metric=choice", "data.tasks.1.metric=exact"]
AWAY = ["memory.checkpointing=on", "memory.offload.activations=cpu"]
DROPOUT = ["adapter.dropout=0.5", "adapter.targets=[q_proj]", "train.steps=2"]
FETCHED = [*AWAY, *DROPOUT, "memory.offload.weights=stream", "train.micro_batch=1"]
CASES = {
    "kept": Case(["memory.checkpointing=off"]),
    "untied": Case(["memory.checkpointing=off"], tied=False),
    "recomputed": Case(["memory.checkpointing=on", "train.optimizer=adamw_8bit"]),
    "embeddings": Case(["memory.offload.embeddings=cpu"], tied=False),
    "activations": Case(AWAY),
    "streamed": Case(["memory.offload.weights=stream"]),
    "streamed, all away": Case([*AWAY, "memory.offload.weights=stream", "memory.offload.embeddings=cpu"], tied=False),
    "packed": Case(["data.packing=true"]),
    "float16": Case(bfloat16=False),
    "dropout": Case(DROPOUT),
    "dropout, packed": Case([*DROPOUT, "data.packing=true"]),
    "in turn": Case([*FETCHED, "memory.accumulation=layer"], layers=4, stays=False),
    "one after the other": Case([*FETCHED, "memory.accumulation=micro_batch"], layers=4, stays=False),
    "in any order": Case(["train.deterministic=false"]),
}


@contextmanager
def carried_over() -> Iterator[None]:
    """Load a base on the host and put it on the card, since bitsandbytes cannot quantise there."""
    load = run_module.load_base

    def loaded(base: Any, device: torch.device, *args: Any, **kwargs: Any) -> Any:
        model = load(base, torch.device("cpu"), *args, **kwargs)
        if device.type == "cuda":
            card.put(model)
        return model

    before = streaming.point_at
    run_module.load_base, streaming.point_at = loaded, card.point_at
    try:
        yield
    finally:
        run_module.load_base, streaming.point_at = load, before


@contextmanager
def no_layer_stays() -> Iterator[None]:
    """Plan as for a card that has room for no layer beside the slots."""
    before = Search._most_to_stay
    Search._most_to_stay = lambda self, layout: 0  # type: ignore[method-assign]
    try:
        yield
    finally:
        Search._most_to_stay = before  # type: ignore[method-assign]


def run(case: Case, folder: Path) -> dict[str, Any]:
    """Train on the card; return losses and what it was given."""
    base = tiny.save_base(folder / "base", tied=case.tied, layers=case.layers)
    tiny.save_tasks(folder / "data")
    path = folder / "recipe.yaml"
    path.write_text(tiny.recipe_text(base, folder / "data", folder / "run"), encoding="utf-8")
    recipe = load_recipe(path, [*METRICS, *case.overrides])
    staying = nullcontext() if case.stays else no_layer_stays()
    with card.present(has_bfloat16=case.bfloat16) as counts, carried_over(), staying:
        trained = train(recipe)
        waits = [[what, where, number] for (what, where), number in counts.waits.most_common()]
        fetched = sum(number for (_, where), number in counts.copies.items() if "streaming.py" in where)
    return {
        "steps": trained.steps,
        "eval_loss": trained.eval_loss,
        "bad": trained.bad_steps,
        "waits": waits,
        "fetched": fetched,
        "launched": sorted(counts.launches),
        "pinned": card.DRIVER.most,
        "planned": json.loads((folder / "run" / "manifest.json").read_text(encoding="utf-8"))["plan"]["host"],
    }


def main(folder: Path, names: list[str]) -> None:
    """Run cases one after the other; a line of JSON each."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for number, name in enumerate(names):
        where = folder / str(number)
        where.mkdir()
        found: dict[str, Any]
        try:
            found = run(CASES[name], where)
        except Exception as error:
            frames = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)[-14:]]
            found = {"error": f"{type(error).__name__}: {error}", "frames": frames}
        print(json.dumps({"case": name, **found}), flush=True)


if __name__ == "__main__":
    if not IS_BUILT:
        sys.exit(3)
    main(Path(sys.argv[1]), sys.argv[2:])
