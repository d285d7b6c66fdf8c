"""grpo: answers that the run writes itself, by a rule's rewards: what it learns, and that nothing of it is chance."""

import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from interrupted import train_in_two
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from qd2mora.data import Pair, Row
from qd2mora.errors import InputRefused
from qd2mora.objectives.grpo import Grpo, advantages
from qd2mora.objectives.objective import Said, divergence, told
from qd2mora.objectives.rules import rule_of
from qd2mora.recipe import Objective, Recipe, load_recipe
from qd2mora.training import train
from qd2mora.training.rollouts import answered

SHORT = "rule: length, words: 1, samples: 4, max_new_tokens: 6"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grpo")
    tiny.save_base(folder / "base")
    # A random base is as good as sure of nothing, and no adapter makes it sure: this one has a mind of its own.
    model = LlamaForCausalLM.from_pretrained(folder / "base")
    model.model.norm.weight.data *= 10
    model.save_pretrained(folder / "base")
    tiny.save_tasks(folder / "data", 12)
    return folder


def recipe_of(made: Path, output: Path, objective: str, *changes: str) -> Recipe:
    path = output.with_suffix(".yaml")
    text = tiny.recipe_text(made / "base", made / "data", output).replace("validation: 8", "validation: 2")
    path.write_text(f"{text}objective: {{kind: grpo, {objective}}}\n", encoding="utf-8")
    return load_recipe(path, ["train.steps=4", "train.eval_every=4", *changes])


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_advantages_and_the_loss_are_the_papers() -> None:
    rewards = [1.0, 0.0, 0.5, 0.0]
    spread = statistics.stdev(rewards) + 1e-4
    assert advantages(rewards) == pytest.approx([(each - 0.375) / spread for each in rewards])
    assert advantages([2.0, 2.0]) == [0, 0] and advantages([3.0]) == [0]
    row = Row(0, torch.arange(5, dtype=torch.int32).numpy(), 2, Pair("a", "b"))
    lines = [answered(row, [7, 8, 9, 9], 1.5), answered(row, [7], -0.5)]
    said = Said(torch.tensor([8.0, 3.0]), lines)
    assert Grpo().losses(said).tolist() == pytest.approx([1.5 * 8 / 4, -0.5 * 3])
    assert [line.ids.tolist() for line in lines] == [[0, 1, 7, 8, 9, 9], [0, 1, 7]]


def test_the_pull_to_the_reference_is_the_papers_estimator_and_nothing_at_the_reference_itself() -> None:
    ours = [torch.tensor(each, dtype=torch.float64, requires_grad=True) for each in ([0.3, 1.2, 2.0], [0.7])]
    theirs = [torch.tensor(each, dtype=torch.float64) for each in ([0.9, 1.1, 2.0], [0.1])]
    row = Row(0, torch.arange(5, dtype=torch.int32).numpy(), 2, Pair("a", "b"))
    lines = [answered(row, [7, 8, 9], 1.5), answered(row, [7], -0.5)]
    apart = torch.stack([divergence(own, ref).sum() for own, ref in zip(ours, theirs, strict=True)])
    said = Said(torch.stack([own.sum() for own in ours]), lines, divergence=apart)
    losses, wanted = Grpo(0.2).losses(said), []
    for own, ref, worth in zip(ours, theirs, (1.5, -0.5), strict=True):
        p, q = (-own).exp().tolist(), (-ref).exp().tolist()
        k3 = [b / a - math.log(b / a) - 1 for a, b in zip(p, q, strict=True)]
        wanted.append(sum(0.2 * k - worth * math.log(a) for k, a in zip(k3, p, strict=True)) / len(p))
    assert losses.tolist() == pytest.approx(wanted)
    # d k3 / d log p = 1 - ref / p, of each token.
    (gradient,) = torch.autograd.grad(apart[0], ours[0])
    assert gradient.tolist() == pytest.approx([-(1 - math.exp(o - r)) for o, r in ((0.3, 0.9), (1.2, 1.1), (2.0, 2.0))])
    assert told(Grpo(0.2).names, Grpo(0.2).measures(said).flatten().tolist()) == pytest.approx(
        {"kl": (float(apart[0].detach()) / 3 + float(apart[1].detach())) / 2}
    )
    assert not divergence(theirs[0], theirs[0]).any()


@pytest.mark.long
def test_a_run_that_is_pulled_stays_nearer_to_its_reference_and_ends_with_the_same_bytes_when_broken_off(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, kl in (("free", 1e-9), ("pulled", 2.0)):
        train(recipe_of(made, tmp_path / name, f"{SHORT}, kl: {kl}", "train.steps=6"))
    train_in_two(recipe_of(made, tmp_path / "two", f"{SHORT}, kl: 2.0", "train.steps=6"), 3, monkeypatch)
    adapters = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("pulled", "two")]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
    free, pulled = ([line["kl"] for line in lines_of(tmp_path / name) if "kl" in line] for name in ("free", "pulled"))
    assert len(free) == len(pulled) == 6 and free[0] == pulled[0] == pytest.approx(0, abs=1e-6)
    assert 0 < pulled[-1] < free[-1]


@pytest.mark.parametrize(
    ("settings", "written", "reward"),
    [
        ({}, " blue  sun", 1.0),
        ({}, "blue", 0.0),
        ({"rule": "regex", "pattern": r"^\d+$"}, "42", 1.0),
        ({"rule": "regex", "pattern": r"^\d+$"}, "forty", 0.0),
        ({"rule": "length", "words": 4}, "one two three", 0.75),
        ({"rule": "length", "words": 2}, "a b c d e f g", 0.0),
    ],
)
def test_rules_say_what_an_answer_is_worth(settings: dict[str, Any], written: str, reward: float) -> None:
    told = Objective.model_validate({"kind": "grpo", **settings})
    assert rule_of(told, None)("prompt", written, "blue sun") == reward


@pytest.mark.long
def test_a_planted_letter_is_learned_and_held_out_rows_tell(made: Path, tmp_path: Path) -> None:
    objective = "rule: regex, pattern: e, samples: 8, max_new_tokens: 3"
    changes = ("train.steps=12", "train.learning_rate=1e-2", "train.eval_every=12", "train.schedule=constant")
    train(recipe_of(made, tmp_path / "run", objective, *changes))
    lines = lines_of(tmp_path / "run")
    rewards = [line["reward"] for line in lines if "reward" in line]
    assert len(rewards) == 12
    assert statistics.mean(rewards[:4]) < 0.1 and statistics.mean(rewards[-3:]) > 0.8
    first, last = (line for line in lines if "eval_loss" in line)
    for task in ("first", "last"):
        # Greedy answers to rows that it never saw.
        assert (first["eval_measures"][task]["reward"], last["eval_measures"][task]["reward"]) == (0, 1)
        assert last["eval_loss"][task] == -1


@pytest.mark.long
def test_a_run_that_is_broken_off_draws_the_same_answers(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(recipe_of(made, tmp_path / "whole", SHORT))
    train_in_two(recipe_of(made, tmp_path / "two", SHORT), 2, monkeypatch)
    whole, two = (load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("whole", "two"))
    assert all(torch.equal(whole[name], two[name]) for name in whole)
    drawn = [[line["reward"] for line in lines_of(tmp_path / run) if "reward" in line] for run in ("whole", "two")]
    assert drawn[0] == drawn[1] and len(set(drawn[0])) > 1


@pytest.mark.long
def test_the_split_into_micro_batches_and_a_rehearsal_change_nothing(made: Path, tmp_path: Path) -> None:
    train(recipe_of(made, tmp_path / "whole", SHORT, "memory.rehearsal=off"))
    train(recipe_of(made, tmp_path / "split", SHORT, "train.micro_batch=1", "memory.rehearsal=on"))
    whole, split = (load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("whole", "split"))
    for name in whole:
        torch.testing.assert_close(whole[name], split[name], rtol=1e-3, atol=2e-5)


REWARDS = """
import math
from pathlib import Path

def reward(prompt, written, right):
    if {bad}:
        {answer}
    return float(len(written))
"""


def reward_file(folder: Path, bad: str, answer: str) -> Path:
    path = folder / "rewards.py"
    path.write_text(REWARDS.format(bad=bad, answer=answer), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("raise KeyError('colour')", "KeyError: 'colour'"),
        ("return math.nan", "nan is no finite number"),
        ("return 'good'", "'good' is no finite number"),
    ],
)
def test_a_reward_that_cannot_be_had_is_named_and_stops_the_run(
    answer: str, words: str, made: Path, tmp_path: Path
) -> None:
    file = reward_file(tmp_path, "'last' in prompt", answer)
    with pytest.raises(InputRefused, match=rf"--reward-file: the reward of .* cannot be had: {re.escape(words)}"):
        train(recipe_of(made, tmp_path / "run", "rule: file, samples: 2, max_new_tokens: 4"), reward_file=file)


def test_bad_rewards_are_left_out_and_counted_where_that_was_asked_for_and_the_file_is_the_runs(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    objective = "rule: file, samples: 4, max_new_tokens: 4"
    file = reward_file(tmp_path, "len(written) % 3 == 0", "raise RuntimeError('three')")
    recipe = recipe_of(made, tmp_path / "run", objective, "data.on_bad_row=skip", "train.steps=2")
    train(recipe, reward_file=file)
    steps = [line for line in lines_of(tmp_path / "run") if "reward" in line]
    assert sum(line["bad_rewards"] for line in steps) > 0
    assert "RuntimeError: three" in capsys.readouterr().out
    reward_file(tmp_path, "False", "pass")
    with pytest.raises(InputRefused, match=r"objective\.reward_file changed since the run began"):
        train(recipe, resume=True, reward_file=file)
    with pytest.raises(InputRefused, match=r"--reward-file: goes with objective\.rule: file"):
        train(recipe, resume=True)
    with pytest.raises(InputRefused, match=r"'.*gone\.py' is no Python file"):
        train(recipe, resume=True, reward_file=tmp_path / "gone.py")


@pytest.mark.parametrize(
    ("objective", "changes", "words"),
    [
        ("rule: regex", (), "pattern goes with rule: regex"),
        ("rule: regex, pattern: '('", (), "is no regular expression"),
        ("words: 3", (), "words goes with rule: length"),
        ("beta: 0.1", (), "beta is no setting of grpo"),
        ("samples: 2", ("data.packing=true",), "grpo learns its own answers"),
        ("max_new_tokens: 128", (), "leave no room for a prompt"),
        (
            "max_new_tokens: 4",
            ("data.tasks.0.format=text", "data.tasks.0.fields={text: output}"),
            "text has no prompts",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(
    objective: str, changes: tuple[str, ...], words: str, made: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputRefused, match=words):
        train(recipe_of(made, tmp_path / "run", objective, *changes))
    assert not (tmp_path / "run").exists()
