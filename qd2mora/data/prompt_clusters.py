"""How many kinds of prompt there are: k-means over prompts, which HydraLoRA's authors suggest to choose experts by.

A prompt is its bag of tokens, weighed by rarity (TF-IDF: count times log((1 + n) / (1 + n_t)) + 1), thrown onto
DIMENSIONS random directions, which keeps angles, and scaled to length one. The number of clusters is the one with the
best silhouette (Rousseeuw 1987); the elbow, where the curve of inertia is farthest below its chord, is told beside it.

Shapes: n points, D dimensions, k clusters. All in float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]
Labels = NDArray[np.int64]

DIMENSIONS = 256
STARTS = 4
ROUNDS = 100


@dataclass(frozen=True)
class Clustering:
    """One number of clusters: its labels (n,), its inertia as a share of one cluster's, its mean silhouette."""

    k: int
    labels: Labels
    inertia: float
    silhouette: float


def embedded(prompts: Sequence[NDArray[np.int32]], generator: np.random.Generator) -> Points:
    """Return token rows as points (n, DIMENSIONS) of length one."""
    bags = [np.unique(ids, return_counts=True) for ids in prompts]
    seen, number = np.unique(np.concatenate([tokens for tokens, _ in bags]), return_counts=True)
    rarity = np.log((1 + len(prompts)) / (1 + number)) + 1
    directions = generator.standard_normal((len(seen), DIMENSIONS))
    places = [np.searchsorted(seen, tokens) for tokens, _ in bags]
    points = np.stack(
        [(count * rarity[place]) @ directions[place] for place, (_, count) in zip(places, bags, strict=True)]
    )
    return points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)


def cluster(points: Points, most: int, generator: np.random.Generator) -> list[Clustering]:
    """Return the clusterings into 2 to `most` clusters."""
    whole = float(_squared(points, points.mean(0, keepdims=True)).sum())
    distances = np.sqrt(_squared(points, points))
    found = []
    for k in range(2, min(most, len(np.unique(points, axis=0))) + 1):
        labels, inertia = k_means(points, k, generator)
        found.append(Clustering(k, labels, inertia / whole, silhouette(distances, labels)))
    return found


def k_means(points: Points, k: int, generator: np.random.Generator) -> tuple[Labels, float]:
    """Return labels and the sum of squared distances to the centres: the best of STARTS runs of Lloyd's rounds."""
    # Lloyd's rounds end in a local optimum: the best of a few starts.
    runs = [_lloyd(points, _spread_centres(points, k, generator)) for _ in range(STARTS)]
    return min(runs, key=lambda run: run[1])


def silhouette(distances: Points, labels: Labels) -> float:
    """Return the mean over points of (b - a) / max(a, b): a, the mean distance (n, n) within its cluster, b, to the
    nearest other; a point alone counts 0."""
    # One product sums every point's distances to every cluster.
    of_label = np.eye(labels.max() + 1)[labels]
    sizes = of_label.sum(0)
    sums = distances @ of_label
    rows = np.arange(len(labels))
    own = sizes[labels]
    within = sums[rows, labels] / np.maximum(own - 1, 1)
    means = sums / np.maximum(sizes, 1)
    means[rows, labels] = np.inf  # its own cluster is not the nearest other one, nor is one without points
    means[:, sizes == 0] = np.inf
    other = means.min(1)
    values = np.where(own > 1, (other - within) / np.maximum(np.maximum(other, within), 1e-12), 0.0)
    return float(values.mean())


def elbow(found: Sequence[Clustering]) -> int:
    """Return the number of clusters whose inertia is farthest below the line from one cluster to the most."""
    ks = np.array([1, *(each.k for each in found)], dtype=np.float64)
    inertia = np.array([1.0, *(each.inertia for each in found)])
    chord = np.interp(ks, [ks[0], ks[-1]], [inertia[0], inertia[-1]])
    return int(ks[np.argmax(chord - inertia)])


def _spread_centres(points: Points, k: int, generator: np.random.Generator) -> Points:
    """k-means++: each further centre is a point drawn by its squared distance from those there are."""
    chosen = [int(generator.integers(len(points)))]
    nearest = _squared(points, points[chosen])[:, 0]
    while len(chosen) < k:
        chosen.append(int(generator.choice(len(points), p=nearest / nearest.sum())))
        nearest = np.minimum(nearest, _squared(points, points[chosen[-1:]])[:, 0])
    return points[chosen].copy()


def _lloyd(points: Points, centres: Points) -> tuple[Labels, float]:
    labels = np.full(len(points), -1)
    for _ in range(ROUNDS):
        distances = _squared(points, centres)
        before, labels = labels, distances.argmin(1)
        if np.array_equal(before, labels):
            break
        for number in range(len(centres)):
            mine = points[labels == number]
            # A cluster that lost all its points starts again at the point that is worst off.
            centres[number] = mine.mean(0) if len(mine) else points[distances.min(1).argmax()]
    return labels, float(_squared(points, centres)[np.arange(len(points)), labels].sum())


def _squared(one: Points, two: Points) -> Points:
    """Return squared distances (n, m)."""
    products = one @ two.T
    # By |a|^2 + |b|^2 - 2ab, one product for all pairs; rounding may leave a little less than nothing.
    return np.maximum((one**2).sum(1)[:, None] + (two**2).sum(1)[None] - 2 * products, 0.0)


__all__ = ["Clustering", "cluster", "elbow", "embedded", "k_means", "silhouette"]
