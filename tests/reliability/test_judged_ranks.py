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
def test_two_processes_learn_a_preference_as_one_does(
    kind: str, judged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QD2MORA_CACHE", str(tmp_path / "cache"))
    one, two = tmp_path / "one", tmp_path / "two"
    for output in (one, two):
        runs.recipe_of(judged, output, kind)
    assert forked.outcome(forked.train_run, one.with_suffix(".yaml")) == 0
    log = tmp_path / "log"
    pair = pairs.start_pair(pairs.train_pair, two.with_suffix(".yaml"), log=log)
    assert pairs.ended(pair) == [0, 0], log.read_text()
    ours, theirs = runs.adapter_of(one), runs.adapter_of(two)
    if kind == "kto":  # its baseline is a sum of sums
        assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in ours)
    else:
        assert runs.bytes_of(one) == runs.bytes_of(two)
    for mine, other in zip(runs.lines_of(one), runs.lines_of(two), strict=True):
        for name in ("loss", "accuracy", "margin", "reward_chosen", "reward_good", "baseline"):
            assert other.get(name, 0) == pytest.approx(mine.get(name, 0), rel=1e-4, abs=1e-5), name
        assert other.get("eval_loss", {}) == pytest.approx(mine.get("eval_loss", {}), rel=1e-4)


@pytest.mark.long
def test_two_processes_write_answers_and_learn_them_as_one_does(
    judged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One writes for both, and each is pulled to a reference of its own; rewards differ in some step."""
    monkeypatch.setenv("QD2MORA_CACHE", str(tmp_path / "cache"))
    tiny.save_tasks(judged / "answers", 12)
    one, two = tmp_path / "one", tmp_path / "two"
    for output in (one, two):
        text = tiny.recipe_text(judged / "base", judged / "answers", output).replace("validation: 8", "validation: 2")
        settings = "rule: length, words: 3, samples: 4, max_new_tokens: 6, temperature: 2.0, kl: 0.1"
        text += f"objective: {{kind: grpo, {settings}}}\n"
        output.with_suffix(".yaml").write_text(text.replace("steps: 6", "steps: 3"), encoding="utf-8")
    assert forked.outcome(forked.train_run, one.with_suffix(".yaml")) == 0
    log = tmp_path / "log"
    pair = pairs.start_pair(pairs.train_pair, two.with_suffix(".yaml"), log=log)
    assert pairs.ended(pair) == [0, 0], log.read_text()
    steps = [[line for line in runs.lines_of(run) if "loss" in line] for run in (one, two)]
    assert any(line["groups_that_differ"] for line in steps[0])
    for mine, other in zip(*steps, strict=True):
        for name in ("loss", "reward", "groups_that_differ", "answer_tokens", "kl", "grad_norm"):
            assert other[name] == pytest.approx(mine[name], rel=1e-4, abs=1e-6), name
    ours, theirs = runs.adapter_of(one), runs.adapter_of(two)
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in ours)
