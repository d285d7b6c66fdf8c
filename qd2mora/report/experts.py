"""How many experts a recipe's prompts ask for, as a table."""

from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from qd2mora.base import load_tokenizer
from qd2mora.data import prepare
from qd2mora.data.components import cluster, elbow, embedded
from qd2mora.errors import InputRefused
from qd2mora.recipe import Recipe

PROMPTS = 1500
WEAK = 0.1
"""A silhouette below this says that clusters overlap."""


def suggest_experts(recipe: Recipe, most: int) -> dict[str, Any]:
    """Cluster a sample of prompts, as many of each task; return the suggestion and what it rests on.

    Raises InputRefused where there are too few different prompts to tell.
    """
    tasks = prepare(recipe.data, load_tokenizer(recipe.base.model), recipe.train.seed)
    generator = np.random.default_rng(recipe.train.seed)
    prompts, of_task = [], []
    for number, task in enumerate(tasks):
        places = generator.permutation(len(task.train))[: max(1, PROMPTS // len(tasks))].tolist()
        for row in (task.train[place] for place in sorted(places)):
            end = row.earlier[0][0] if row.earlier else row.masked
            prompts.append(row.ids[: end or len(row.ids)])
            of_task.append(number)
    found = cluster(embedded(prompts, generator), most, generator)
    if not found:
        raise InputRefused("data.tasks: all prompts are the same: there is nothing to tell kinds apart by")
    best = max(found, key=lambda each: each.silhouette)
    table = [np.bincount(best.labels[np.equal(of_task, number)], minlength=best.k) for number in range(len(tasks))]
    return {
        "experts": best.k,
        "elbow": elbow(found),
        "silhouette": best.silhouette,
        "is_weak": best.silhouette < WEAK,
        "prompts": len(prompts),
        "tried": [{"k": each.k, "inertia": each.inertia, "silhouette": each.silhouette} for each in found],
        "tasks": {task.task.name: counts.tolist() for task, counts in zip(tasks, table, strict=True)},
    }


def show_suggestion(found: dict[str, Any], console: Console) -> None:
    """Print a suggestion and the numbers behind it."""
    tried = Table(title=f"clusters of {found['prompts']} prompts")
    for heading in ("clusters", "inertia", "silhouette"):
        tried.add_column(heading, justify="right")
    for each in found["tried"]:
        tried.add_row(str(each["k"]), f"{each['inertia']:.1%}", f"{each['silhouette']:.3f}")
    console.print(tried)
    members = Table(title=f"prompts of each task in the {found['experts']} clusters")
    members.add_column("task")
    for number in range(found["experts"]):
        members.add_column(str(number + 1), justify="right")
    for task, counts in found["tasks"].items():
        members.add_row(task, *map(str, counts))
    console.print(members)
    console.print(
        f"suggested: adapter.up.experts={found['experts']} (best silhouette, {found['silhouette']:.3f}); "
        f"the elbow of the inertia is at {found['elbow']}",
        highlight=False,
    )
    if found["is_weak"]:
        console.print("the clusters overlap much: take this as a hint, and compare", highlight=False)


__all__ = ["show_suggestion", "suggest_experts"]
