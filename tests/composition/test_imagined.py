"""Cores for a task that nothing was trained on: planted ones are found, and what comes out is an adapter."""

import json
from pathlib import Path

import pytest
import tiny
import torch

from qd2mora.composition import ComposeOptions, compose
from qd2mora.composition.imagine import KL_WEIGHT, LATENT, CoreNetwork, Span
from qd2mora.composition.inputs import read_mixture
from qd2mora.errors import InputRefused
from qd2mora.evaluation import TalkOptions, generate
from qd2mora.recipe import Recipe, load_recipe
from qd2mora.run_folder import open_run
from qd2mora.training import train


def planted(number: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Task vectors of three hidden causes, a little noise beside them, and cores that are linear in the vectors."""
    chance = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=chance, dtype=torch.float64)

    tasks = 3 + drawn(number, 3) @ drawn(3, 24) + 0.01 * drawn(number, 24)
    return tasks, 0.1 * (tasks @ drawn(24, 60)) + drawn(60)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long), pytest.param(2, marks=pytest.mark.long)])
def test_cores_that_follow_the_task_vector_are_found_for_a_task_that_is_held_out(seed: int) -> None:
    tasks, cores = planted(9, seed)
    for held in (0, 4):
        others = [place for place in range(9) if place != held]
        network = CoreNetwork.fitted(tasks[others], cores[others])
        nearest = others[int((tasks[others] - tasks[held]).norm(dim=1).argmin())]
        ours = (network.imagined(tasks[held]) - cores[held]).norm()
        assert ours < 0.5 * (cores[nearest] - cores[held]).norm()
        assert ours < 0.5 * (cores[others].mean(0) - cores[held]).norm()
        assert network.error(tasks[others], cores[others]) < 0.1


def test_another_condition_gives_other_cores_and_the_same_one_the_same() -> None:
    tasks, cores = planted(6)
    network, again = (CoreNetwork.fitted(tasks, cores) for _ in range(2))
    assert torch.equal(network.imagined(tasks), again.imagined(tasks))
    assert (network.imagined(tasks[0]) - network.imagined(tasks[1])).norm() > 0.5 * (cores[0] - cores[1]).norm()


def test_the_loss_is_that_of_the_paper() -> None:
    tasks, cores = planted(4)
    network = CoreNetwork(Span.of(tasks), Span.of(cores))
    for tensor in network.parameters():
        torch.nn.init.normal_(tensor, std=0.3)
    c, x = network.tasks.coordinates(tasks), network.cores.coordinates(cores)
    mean, log_variance = network.encoder(torch.cat([c, x], -1)).split(LATENT, -1)
    own = torch.distributions.Normal(mean, (log_variance / 2).exp())
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3), dtype=mean.dtype)
    divergence = torch.distributions.kl_divergence(own, torch.distributions.Normal(0.0, 1.0)).sum(-1).mean()
    wanted = ((network.decoded(c, mean + own.stddev * noise) - x) ** 2).mean() + KL_WEIGHT * divergence
    torch.testing.assert_close(network.loss(c, x, torch.Generator().manual_seed(3)), wanted)


def test_a_span_gives_back_what_lies_in_it_and_tells_what_does_not() -> None:
    tasks, _ = planted(5)
    span = Span.of(tasks)
    torch.testing.assert_close(span.vectors(span.coordinates(tasks)), tasks)
    assert len(span.directions) == 4 and span.outside(tasks[2]) < 1e-9
    other = torch.zeros(24, dtype=torch.float64)
    other[0] = 1e6
    assert 0.1 < span.outside(other) <= 1
    alike = Span.of(tasks[:1].expand(3, -1))
    assert torch.isfinite(alike.coordinates(tasks)).all()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shared adapter, and three tasks whose cores alone were trained over it."""
    folder = tmp_path_factory.mktemp("runs")
    tiny.save_base(folder / "base")
    tiny.save_tasks(folder / "data", 24)
    train(recipe(folder, "shared", "first"))
    for place, name in enumerate(("one", "two", "three")):
        rows = [row | {"instruction": f"{tiny.WORDS[place] * 3}: say it."} for row in tiny.rows_of("last", 16)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "data" / f"{name}.jsonl").write_text(text, encoding="utf-8")
        train(recipe(folder, name, name, f"start: {folder / 'shared'}", "stages: [{train: cores}]"))
    recipe(folder, "new", "last")
    return folder


def recipe(folder: Path, run: str, task: str, start: str = "", stages: str = "") -> Recipe:
    adapter = start or "method: moslora, rank: 4, alpha: 8, targets: [q_proj, v_proj]"
    path = folder / f"{run}.yaml"
    path.write_text(
        f"base: {{model: {folder / 'base'}, quantization: none}}\nadapter: {{{adapter}}}\n"
        f"data: {{tasks: [{{name: {task}, path: {folder / 'data' / task}.jsonl}}], max_length: 128}}\n"
        "train: {steps: 3, micro_batch: 4, global_batch: 4, learning_rate: 1e-2"
        f"{', ' + stages if stages else ''}}}\noutput: {folder / run}\n",
        encoding="utf-8",
    )
    return load_recipe(path)


def test_what_is_imagined_is_an_adapter_of_the_shared_experts(runs: Path, tmp_path: Path) -> None:
    given = [str(runs / name) for name in ("one", "two", "three")]
    shared = read_mixture(str(runs / "shared"))[1]
    for folder in given:
        for name, tensors in read_mixture(folder)[1].items():
            assert not torch.equal(tensors["mixture_core"], shared[name]["mixture_core"])
            assert all(torch.equal(tensors[kind], shared[name][kind]) for kind in ("mixture_A", "mixture_B"))
    done = compose("imagine", given, tmp_path / "new", ComposeOptions(on=runs / "new.yaml"))
    assert done.words.startswith("experimental: cores of moslora")
    made, theirs = read_mixture(str(tmp_path / "new"))[1], [read_mixture(each)[1] for each in given]
    for name, tensors in made.items():
        assert torch.equal(tensors["mixture_A"], shared[name]["mixture_A"])
        assert torch.isfinite(tensors["mixture_core"]).all()
        assert not any(torch.equal(tensors["mixture_core"], each[name]["mixture_core"]) for each in theirs)
    train(recipe(runs, "on", "last", f"start: {tmp_path / 'new'}"))  # loads in the ordinary way
    open_run(runs / "on")
    assert isinstance(generate(runs / "on", "Say the last word.", TalkOptions(max_new_tokens=2)), str)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["one", "two"], "2 tasks show nothing of how cores follow a task; 3 or more"),
        (["one", "two", "shared/adapter"], "is no run, whose rows would tell its task"),
        (["one", "two", "apart"], "train cores alone over one adapter.start"),
        (["plain", "one", "two"], "has no cores in"),
        (["one", "two", "one"], "is given twice; give each once"),
    ],
)
def test_what_cannot_be_imagined_from_is_refused(names: list[str], words: str, runs: Path, tmp_path: Path) -> None:
    if "apart" in names and not (runs / "apart").exists():
        train(recipe(runs, "apart", "two", f"start: {runs / 'shared'}"))
    if "plain" in names and not (runs / "plain").exists():
        lora = "method: hydralora, rank: 4, alpha: 8, targets: [q_proj, v_proj]"
        train(recipe(runs, "plain", "two", lora))
    with pytest.raises(InputRefused, match=words):
        given = [str(runs / name) for name in names]
        compose("imagine", given, tmp_path / "out", ComposeOptions(on=runs / "new.yaml"))
    assert not (tmp_path / "out").exists()
