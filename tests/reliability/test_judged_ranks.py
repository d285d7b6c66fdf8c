"""Two processes learn a preference as one does: the same adapter, the same margins, one baseline for both."""

from pathlib import Path

import forked_runs as forked
import judged_runs as runs
import paired_runs as pairs
import pytest
import tiny
import torch


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judged")
    tiny.save_base(folder / "base")
    runs.save_rows(folder / "data")
    return folder


@pytest.mark.long
@pytest.mark.parametrize("kind", runs.KINDS)
def test_two_processes_learn_as_one_does(
    kind: str, judged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of answers of its own one process writes for both, and each is pulled to a reference of its own."""
    monkeypatch.setenv("QD2MORA_CACHE", str(tmp_path / "cache"))
    one, two = tmp_path / "one", tmp_path / "two"
    if kind == "experts":
        runs.inner_of(judged)
        assert forked.outcome(forked.train_run, judged / "inner.yaml") == 0
    for output in (one, two):
        runs.recipe_of(judged, output, kind)
    assert forked.outcome(forked.train_run, one.with_suffix(".yaml")) == 0
    log = tmp_path / "log"
    pair = pairs.start_pair(pairs.train_pair, two.with_suffix(".yaml"), log=log)
    assert pairs.ended(pair) == [0, 0], log.read_text()
    ours, theirs = runs.trained_of(one), runs.trained_of(two)
    if kind in ("kto", "grpo", "experts"):  # sums of sums
        assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in ours)
    else:
        assert runs.bytes_of(one) == runs.bytes_of(two)
    measured = ("accuracy", "margin", "reward_chosen", "reward_good", "baseline", "worth")
    written = ("reward", "groups_that_differ", "answer_tokens", "kl")
    for mine, other in zip(runs.lines_of(one), runs.lines_of(two), strict=True):
        for name in ("loss", *measured, *written):
            assert other.get(name, 0) == pytest.approx(mine.get(name, 0), rel=1e-4, abs=1e-5), name
        assert other.get("eval_loss", {}) == pytest.approx(mine.get("eval_loss", {}), rel=1e-4)
    if kind == "grpo":
        assert any(line.get("groups_that_differ") for line in runs.lines_of(one))
