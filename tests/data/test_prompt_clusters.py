"""Clusters of prompts: planted ones are found, and every number equals the obvious slow one."""

import numpy as np
import pytest

from qd2mora.data.prompt_clusters import cluster, elbow, embedded, k_means, silhouette


def planted(k: int, seed: int = 0, size: int = 30) -> tuple[np.ndarray, np.ndarray]:
    chance = np.random.default_rng(seed)
    centres = chance.standard_normal((k, 7)) * 6
    labels = np.repeat(np.arange(k), size)
    return centres[labels] + chance.standard_normal((k * size, 7)), labels


def slow_silhouette(points: np.ndarray, labels: np.ndarray) -> float:
    values = []
    for number, point in enumerate(points):
        means = {}
        for label in set(labels.tolist()):
            others = [place for place in range(len(points)) if labels[place] == label and place != number]
            if others:
                means[label] = np.mean([np.linalg.norm(point - points[place]) for place in others])
        if labels[number] not in means:
            values.append(0.0)
            continue
        own = means.pop(labels[number])
        other = min(means.values())
        values.append((other - own) / max(own, other))
    return float(np.mean(values))


@pytest.mark.parametrize("k", [2, 3, 5])
def test_planted_clusters_are_found_and_counted(k: int) -> None:
    points, wanted = planted(k, size=25)
    found = cluster(points, 8, np.random.default_rng(0))
    best = max(found, key=lambda each: each.silhouette)
    assert best.k == k
    pairs = set(zip(wanted.tolist(), best.labels.tolist(), strict=True))
    assert len(pairs) == k
    assert [each.k for each in found] == list(range(2, 9))
    if k == 3:
        assert elbow(found) == k


def test_silhouette_and_inertia_equal_the_definition() -> None:
    points, _ = planted(3, size=9)
    labels, inertia = k_means(points, 4, np.random.default_rng(1))
    centres = np.stack([points[labels == number].mean(0) for number in range(4)])
    assert inertia == pytest.approx(sum(np.sum((p - centres[n]) ** 2) for p, n in zip(points, labels, strict=True)))
    # No point is nearer to another centre: the rounds ended where they should.
    distances = np.linalg.norm(points[:, None] - centres[None], axis=2)
    assert np.array_equal(distances.argmin(1), labels)
    lonely = labels.copy()
    lonely[0] = 4
    for each in (labels, lonely):
        matrix = np.linalg.norm(points[:, None] - points[None], axis=2)
        assert silhouette(matrix, each) == pytest.approx(slow_silhouette(points, each))


def test_prompts_of_the_same_rare_words_are_near_and_common_words_count_little() -> None:
    common = np.arange(20)
    prompts = [np.concatenate([common, [100 + kind, 200 + kind, 300 + kind]]).astype(np.int32) for kind in (0, 0, 1, 1)]
    prompts[1] = prompts[1][::-1].copy()
    many = prompts + [np.concatenate([common, [400 + n]]).astype(np.int32) for n in range(40)]
    points = embedded(many, np.random.default_rng(0))
    assert np.allclose(np.linalg.norm(points, axis=1), 1)
    assert np.allclose(points[0], points[1]) and np.allclose(points[2], points[3])
    assert points[0] @ points[2] < 0.8
    assert cluster(points[:2], 5, np.random.default_rng(0)) == []
