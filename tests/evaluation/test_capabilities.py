"""Reward by capability: experts are trained one by one, then a small network over what they score, by kind of task."""

import json
from pathlib import Path
from random import Random

import judged_runs as runs
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qd2mora.errors import InputRefused
from qd2mora.evaluation import evaluate
from qd2mora.evaluation.rewards import score_answers
from qd2mora.inspection import inspect_run
from qd2mora.memory.plan import plan
from qd2mora.objectives.head import OverExperts, scored, stored_head
from qd2mora.recipe import Recipe
from qd2mora.run_folder import read_recipe
from qd2mora.training import train

WORTH = {"suns": (1, 0), "cats": (0, 1), "light": (1, -1), "pets": (-1, 1)}
"""What a word `sun` and a word `cat` are worth: two capabilities, and two kinds of task that weigh them."""


def worth(answer: str, task: str) -> int:
    sun, cat = WORTH[task]
    return sun * answer.split().count("sun") + cat * answer.split().count("cat")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, pairs of each kind, a run that scores by capability, and one whose network weighs those by task."""
    folder, draw = tmp_path_factory.mktemp("capabilities"), Random(0)
    tiny.save_base(folder / "base")
    for task in WORTH:
        rows: list[dict[str, str]] = []
        while len(rows) < 100:
            answers = [" ".join(draw.choice(["sun", "cat", "two"]) for _ in range(4)) for _ in range(2)]
            answers.sort(key=lambda answer: worth(answer, task))
            if worth(answers[0], task) < worth(answers[1], task):
                prompt = f"Say {draw.choice(tiny.WORDS)}: "
                rows.append({"prompt": prompt, "chosen": answers[1], "rejected": answers[0]})
        (folder / f"{task}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    adapter = "{method: peam, rank: 4, alpha: 8, targets: [q_proj, v_proj, down_proj]}"
    train(recipe_of(folder, folder / "inner", ("suns", "cats"), adapter, "reward"))
    train(recipe_of(folder, folder / "outer", ("light", "pets"), f"{{start: {folder / 'inner'}}}", EXPERTS))
    return folder


def test_fewer_tasks_than_experts_are_trained_and_inspected(made: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(recipe_of(made, run, ("light",), f"{{start: {made / 'inner'}}}", EXPERTS, "train.steps=1"))
    assert not inspect_run(run).routers and list(evaluate(run)) == ["light"]


EXPERTS = "{kind: reward, head: experts}"


LONGER = [
    *("train.steps=60", "train.micro_batch=8", "train.global_batch=8", "train.learning_rate=1e-2"),
    *("train.save_every=60", "train.eval_every=60"),
]


def recipe_of(made: Path, output: Path, tasks: tuple[str, ...], adapter: str, objective: str, *changes: str) -> Recipe:
    listed = [f"{{name: {name}, path: {made / name}.jsonl, format: preference, validation: 20}}" for name in tasks]
    return runs.recipe_over(made, output, listed, objective, adapter, [*LONGER, *changes])


def test_kinds_of_task_that_want_opposite_things_are_both_learned_over_experts_that_keep_their_bits(made: Path) -> None:
    outer, inner = runs.adapter_of(made / "outer"), runs.adapter_of(made / "inner")
    assert outer.keys() == inner.keys() and all(torch.equal(outer[name], inner[name]) for name in inner)
    first, last = (line for line in runs.lines_of(made / "outer") if "eval_loss" in line)
    for task in ("light", "pets"):
        assert last["eval_measures"][task]["accuracy"] >= 0.85, last
        assert last["eval_loss"][task] < 0.5 * first["eval_loss"][task]
        found = evaluate(made / "outer")[task]
        assert found.loss == pytest.approx(last["eval_loss"][task], rel=1e-3)


def test_the_plan_counts_what_is_trained_and_what_is_passed_through(made: Path) -> None:
    adapter = sum(tensor.numel() for tensor in runs.adapter_of(made / "inner").values())
    head = load_file(made / "outer" / "adapter" / "reward_head.safetensors")
    network = sum(tensor.numel() for name, tensor in head.items() if name != "weight")
    inner, outer = (plan(read_recipe(made / name), "1GiB", torch.device("cpu")) for name in ("inner", "outer"))
    assert inner.trainable_parameters == adapter + 64 and outer.trainable_parameters == network
    assert inner.items["adapters"] == 4 * (adapter + 64)
    assert outer.items["adapters"] == 4 * (network + adapter + 64)
    assert outer.items["gradients"] == 4 * network and "activations" in inner.items | inner.elsewhere
    assert not {"activations", "layer inputs", "gradients in a layer"} & (outer.items | outer.elsewhere).keys()


def test_answers_are_scored_as_rows_of_the_task_that_is_named(made: Path, tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").write_text(
        json.dumps({"prompt": "Say one: ", "answers": ["sun sun sun sun", "cat cat cat cat", "two sun cat two"]}),
        encoding="utf-8",
    )
    for run, task, wanted in (("outer", "light", "sun"), ("outer", "pets", "cat"), ("inner", "cats", "cat")):
        found = score_answers(made / run, tmp_path / "answers.jsonl", None, task)
        assert next(each.answer for each in found if each.is_best).split()[0] == wanted, (run, task)
    first = score_answers(made / "outer", tmp_path / "answers.jsonl")
    assert first == score_answers(made / "outer", tmp_path / "answers.jsonl", None, "light")
    with pytest.raises(InputRefused, match="--task: unknown 'dark'; the run has light, pets"):
        score_answers(made / "outer", tmp_path / "answers.jsonl", None, "dark")


def test_the_network_is_its_formula_and_begins_as_the_mean_of_what_experts_score() -> None:
    torch.manual_seed(0)
    head, task = OverExperts(torch.randn(1, 5), 2, 3).double(), torch.tensor([1, 0, 1])
    scores = torch.randn(3, 3, dtype=torch.float64)
    torch.testing.assert_close(head(scores, task), scores.mean(-1))
    for tensor in head.parameters():
        torch.nn.init.normal_(tensor.requires_grad_(False))
    for row, kind in enumerate(task.tolist()):
        total = sum(scores[row].tolist()) / 3
        for unit in range(16):
            inner = float(head.bias[kind, unit]) + sum(
                float(head.inner[kind, unit, expert]) * float(scores[row, expert]) for expert in range(3)
            )
            total += float(head.outer[kind, unit]) * (inner if inner > 0 else float(head.slope[kind]) * inner)
        assert float(head(scores, task)[row]) == pytest.approx(total)
    states = torch.randn(3, 3, 2, 5)  # of expert, row, token
    asked: list[int] = []

    def states_of(batch: dict[str, Tensor]) -> Tensor:
        (expert,) = set(batch["task_index"].tolist())
        asked.append(expert)
        return states[expert]

    found = scored(head.float(), states_of, {"task_index": task, "labels": torch.zeros(3, 2).long()})
    each = (states[:, :, -1] @ head.weight[0]).T
    torch.testing.assert_close(found, head(each, task))
    assert asked == [0, 1, 2]


@pytest.mark.parametrize(
    ("adapter", "objective", "words"),
    [
        ("{method: peam}", EXPERTS, "name it in adapter.start"),
        ("{start: OUTER}", "reward", "objective.head: experts"),
        ("{start: LORA}", EXPERTS, "no experts of several tasks"),
        ("{start: INNER}", "dpo", "data.tasks: 1, but .* tells 2 tasks apart"),
        ("{start: INNER}", "{kind: dpo, head: experts}", "head is no setting of dpo"),
    ],
)
def test_what_has_no_experts_to_score_by_is_refused(
    adapter: str, objective: str, words: str, made: Path, tmp_path: Path
) -> None:
    if "LORA" in adapter:
        lora = "{method: lora, rank: 2, alpha: 4, targets: [q_proj]}"
        train(recipe_of(made, tmp_path / "lora", ("suns",), lora, "reward", "train.steps=1"))
    tasks = ("light",) if objective == "dpo" else ("light", "pets")
    places = {"OUTER": made / "outer", "INNER": made / "inner", "LORA": tmp_path / "lora"}
    for name, place in places.items():
        adapter = adapter.replace(name, str(place))
    with pytest.raises(InputRefused, match=words):
        train(recipe_of(made, tmp_path / "run", tasks, adapter, objective))


def test_a_head_of_another_shape_is_refused_by_what_it_is(made: Path, tmp_path: Path) -> None:
    tensors = load_file(made / "outer" / "adapter" / "reward_head.safetensors")
    assert isinstance(stored_head(made / "outer" / "adapter", 64), OverExperts)
    with pytest.raises(InputRefused, match=r"no head of this base: .*inner \(2, 16, 2\).* for a width of 32"):
        stored_head(made / "outer" / "adapter", 32)
    save_file(
        {name: tensor for name, tensor in tensors.items() if name != "outer"}, tmp_path / "reward_head.safetensors"
    )
    with pytest.raises(InputRefused, match="no head of this base"):
        stored_head(tmp_path, 64)
