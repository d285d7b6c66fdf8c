"""How many experts the prompts of tasks ask for: clusters of a sample, as many prompts of each task."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qd2mora.data.prepare import TaskRows
from qd2mora.data.prompt_clusters import cluster, elbow, embedded
from qd2mora.errors import InputRefused
from qd2mora.recipe.data import TEXT

PROMPTS = 1500
WEAK = 0.1
"""A silhouette below this says that clusters overlap."""


@dataclass(frozen=True)
class TriedClusters:
    """A number of clusters that was tried: inertia as a share of one cluster's, and the mean silhouette."""

    k: int
    inertia: float
    silhouette: float


@dataclass(frozen=True)
class ExpertSuggestion:
    """A number of experts and what it rests on; `tasks`: how many prompts of each are in each cluster."""

    experts: int
    elbow: int
    silhouette: float
    is_weak: bool
    prompts: int
    tried: list[TriedClusters]
    tasks: dict[str, list[int]]


def suggest_experts(tasks: Sequence[TaskRows], most: int, seed: int) -> ExpertSuggestion:
    """Cluster a sample of prompts into 2 to `most` clusters.

    Raises InputRefused where there are too few different prompts to tell.
    """
    generator = np.random.default_rng(seed)
    prompts, of_task = _sampled(tasks, generator)
    found = cluster(embedded(prompts, generator), most, generator)
    if not found:
        raise InputRefused("data.tasks: all prompts are the same: there is nothing to tell kinds apart by")
    best = max(found, key=lambda each: each.silhouette)
    table = [np.bincount(best.labels[np.equal(of_task, number)], minlength=best.k) for number in range(len(tasks))]
    return ExpertSuggestion(
        experts=best.k,
        elbow=elbow(found),
        silhouette=best.silhouette,
        is_weak=best.silhouette < WEAK,
        prompts=len(prompts),
        tried=[TriedClusters(each.k, each.inertia, each.silhouette) for each in found],
        tasks={task.task.name: counts.tolist() for task, counts in zip(tasks, table, strict=True)},
    )


def _sampled(tasks: Sequence[TaskRows], generator: np.random.Generator) -> tuple[list[NDArray[np.int32]], list[int]]:
    """Return prompts as token ids, and the number of each one's task."""
    prompts, of_task = [], []
    for number, task in enumerate(tasks):
        places = generator.permutation(len(task.train))[: max(1, PROMPTS // len(tasks))].tolist()
        for row in (task.train[place] for place in sorted(places)):
            # Of a conversation the first question counts: what comes later depends on answers.
            end = row.earlier[0][0] if row.earlier else row.masked
            if task.task.format == TEXT:
                end = len(row.ids)
            prompts.append(row.ids[: end or len(row.ids)])
            of_task.append(number)
    return prompts, of_task


__all__ = ["ExpertSuggestion", "TriedClusters", "suggest_experts"]
