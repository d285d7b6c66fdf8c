"""Fitted routers: separable prompts all go to the expert that is best on them, prototypes grow and old ones stay."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

from qd2mora.composition import ComposeOptions, compose
from qd2mora.composition.fit_router import assigned, fitted, least_squares, of_prototypes
from qd2mora.composition.inputs import read_mixture
from qd2mora.errors import InputRefused
from qd2mora.evaluation import Exam, evaluate
from qd2mora.recipe import load_recipe
from qd2mora.training import train

KINDS = {"birds": ("bird cat dog", "red"), "skies": ("sun moon star", "two"), "counts": ("one three two", "blue")}


def save_recipe(folder: Path, name: str, kinds: list[str], train_keys: str = "steps: 24") -> Path:
    """A recipe over tasks that each have words of their own and one answer."""
    tasks = "".join(f"    - {{name: {kind}, path: {folder / kind}.jsonl, validation: 6}}\n" for kind in kinds)
    path = folder / f"{name}.yaml"
    path.write_text(
        f"base: {{model: {folder / 'base'}, quantization: none}}\n"
        "adapter: {method: lora, rank: 4, alpha: 16, targets: [q_proj, v_proj, down_proj]}\n"
        f"data:\n  tasks:\n{tasks}  max_length: 128\n"
        f"train: {{{train_keys}, micro_batch: 8, global_batch: 8, learning_rate: 2e-2}}\n"
        f"output: {folder / name}\n",
        encoding="utf-8",
    )
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("routed")
    tiny.save_base(folder / "base")
    for kind, (words, answer) in KINDS.items():
        rows = [
            {"instruction": f"{words} {tiny.WORDS[place % 12]} {words}", "input": "", "output": answer}
            for place in range(24)
        ]
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for kind in KINDS:
        train(load_recipe(save_recipe(folder, kind, [kind])))
    save_recipe(folder, "all", list(KINDS))
    return folder


def right_answers(folder: Path, adapter: Path) -> dict[str, float]:
    scores = evaluate(adapter, Exam(load_recipe(folder / "all.yaml")))
    return {name: score.mean for name, score in scores.items()}


@pytest.mark.parametrize("kind", ["lsq", "prototype"])
def test_separable_prompts_all_get_the_expert_that_is_best_on_them(folder: Path, tmp_path: Path, kind: str) -> None:
    runs = [str(folder / name) for name in ("counts", "birds", "skies")]
    done = compose("fit-router", runs, tmp_path / "out", ComposeOptions(on=folder / "all.yaml", router=kind))
    assert "rows of each: 18, 18, 18" in done.words
    routed, single, own = (float(part.split()[-1]) for part in done.words.split("loss a token")[1].split(","))
    assert routed == own < single
    assert right_answers(folder, tmp_path / "out") == dict.fromkeys(KINDS, 1.0)


def test_a_bank_of_prototypes_grows_by_a_row_and_what_was_there_stays(folder: Path, tmp_path: Path) -> None:
    two = save_recipe(folder, "two", ["birds", "skies"])
    bank, grown = tmp_path / "bank", tmp_path / "grown"
    compose(
        "fit-router", [str(folder / "birds"), str(folder / "skies")], bank, ComposeOptions(on=two, router="prototype")
    )
    one = ComposeOptions(on=folder / "counts.yaml", router="prototype")
    compose("fit-router", [str(bank), str(folder / "counts")], grown, one)
    before, after = read_mixture(str(bank))[1], read_mixture(str(grown))[1]
    for name, tensors in before.items():
        for kind, tensor in tensors.items():
            assert after[name][kind][:2].equal(tensor) and len(after[name][kind]) == 3
    assert right_answers(folder, bank)["counts"] == 0
    assert right_answers(folder, grown) == dict.fromkeys(KINDS, 1.0)


def test_what_was_fitted_by_least_squares_does_not_grow(folder: Path, tmp_path: Path) -> None:
    runs = [str(folder / name) for name in ("birds", "skies")]
    compose("fit-router", runs, tmp_path / "bank", ComposeOptions(on=folder / "all.yaml"))
    options = ComposeOptions(on=folder / "counts.yaml", router="prototype")
    with pytest.raises(InputRefused, match="fitted by least squares, and its rows are no prototypes"):
        compose("fit-router", [str(tmp_path / "bank"), str(folder / "counts")], tmp_path / "out", options)


def test_descriptions_shortlist_the_adapters_that_the_prompts_speak_of(folder: Path, tmp_path: Path) -> None:
    runs = [str(folder / name) for name in KINDS]
    texts = {runs[0]: "asks about bird, cat and dog", runs[1]: "of sun, moon, star", runs[2]: "one three two"}
    (tmp_path / "d.yaml").write_text(json.dumps(texts), encoding="utf-8")
    options = ComposeOptions(on=save_recipe(folder, "pair", ["skies", "counts"]), describe=tmp_path / "d.yaml", keep=2)
    words = compose("fit-router", runs, tmp_path / "out", options).words
    assert words.endswith(f"by their descriptions {runs[1]}, {runs[2]} of 3 adapters")
    del texts[runs[1]]
    (tmp_path / "d.yaml").write_text(json.dumps(texts), encoding="utf-8")
    with pytest.raises(InputRefused, match="has no description of"):
        compose("fit-router", runs, tmp_path / "other", options)
    with pytest.raises(InputRefused, match="--keep: 5 of 3 inputs"):
        compose("fit-router", runs, tmp_path / "other", replace(options, keep=5))
    with pytest.raises(InputRefused, match="is given twice"):
        compose("fit-router", [runs[0], *runs], tmp_path / "other", options)


def test_clusters_get_experts_one_to_one_at_the_least_cost() -> None:
    # Expert 0 is the best everywhere; giving it where it matters most is cheaper than first come, first served.
    costs = torch.tensor([[0.0, 0.1, 5.0], [0.0, 4.0, 4.5], [0.0, 3.0, 0.2]])
    assert assigned(costs) == [1, 0, 2]
    torch.manual_seed(0)
    found = assigned(torch.rand(6, 6))
    assert sorted(found) == list(range(6))


@pytest.mark.parametrize("kind", ["lsq", "prototype"])
def test_planted_clusters_of_more_states_than_rows_are_routed_whole(kind: str) -> None:
    torch.manual_seed(0)
    owner = torch.arange(30) % 3
    contexts = (4 * torch.randn(3, 50))[owner] + torch.randn(30, 50)
    best = torch.tensor([2, 0, 1])
    losses = torch.rand(30, 3) + 3 * (torch.arange(3) != best[owner][:, None])
    router = fitted(contexts.double(), losses.double(), kind)
    assert router.choices(contexts.double()).equal(best[owner])


def test_the_rows_of_least_squares_solve_its_own_equations() -> None:
    torch.manual_seed(0)
    contexts = torch.randn(40, 5, dtype=torch.float64)
    target = contexts @ torch.randn(5, 2, dtype=torch.float64) + 3
    router = least_squares(contexts, target)
    # The slow way: centred normal equations with the same ridge.
    centred = contexts - contexts.mean(0)
    ridge = 1e-3 * float(centred.square().sum(1).mean()) * torch.eye(5, dtype=torch.float64)
    wanted = torch.linalg.solve(centred.T @ centred + ridge, centred.T @ (target - target.mean(0))).T
    torch.testing.assert_close(router.rows, wanted)


def test_the_nearest_prototype_is_the_largest_score() -> None:
    torch.manual_seed(0)
    contexts, prototypes = torch.randn(50, 7), torch.randn(4, 7)
    assert of_prototypes(prototypes).choices(contexts).equal(torch.cdist(contexts, prototypes).argmin(1))
