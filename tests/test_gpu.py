"""The same product on a CUDA device: what the CPU tests prove, where it will be used."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from interrupted import train_in_two
from safetensors.torch import load_file

from qd2mora.adapter_folder import WEIGHTS
from qd2mora.base import dense_weight, is_nf4, load_base
from qd2mora.mixture import MixtureConfig, MixtureLinear, Routing
from qd2mora.recipe import Base, Recipe, load_recipe

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_the_layer_on_4_bit_weights_equals_the_dense_layer_in_bfloat16() -> None:
    base = load_base(Base(model="random:tiny", compute_dtype="bfloat16"), torch.device("cuda"))
    linear = base.get_submodule("model.layers.0.mlp.up_proj")
    assert is_nf4(linear)
    config = MixtureConfig(method="d2mora", rank=4, alpha=8, down={"experts": 3}, up={"experts": 2})
    layer = MixtureLinear(linear, "default", config, Routing()).cuda()
    torch.nn.init.normal_(layer.tensors("default")["mixture_B"])
    x = torch.randn(2, 9, linear.in_features, device="cuda", dtype=torch.bfloat16)
    dense = torch.nn.Linear(linear.in_features, linear.out_features, bias=False, device="cuda")
    dense.weight.data.copy_(dense_weight(linear))
    twin = MixtureLinear(dense, "default", config, Routing()).cuda()
    twin.load_state_dict({k: v for k, v in layer.state_dict().items() if "mixture_" in k}, strict=False)
    ours, wanted = layer(x).float(), twin(x.float())
    assert (ours - wanted).norm() <= 2e-2 * wanted.norm()  # bfloat16 products


def test_a_run_trains_resumes_and_exports(tmp_path: Path) -> None:
    from qd2mora.merging import merge
    from qd2mora.training import train

    base = tiny.save_base(tmp_path / "base")
    tiny.save_tasks(tmp_path / "data")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(tiny.recipe_text(base, tmp_path / "data", tmp_path / "run"), encoding="utf-8")
    trained = train(load_recipe(recipe, ["train.optimizer=adamw_8bit"]))
    assert trained.steps == 6
    export = merge(tmp_path / "run", tmp_path / "export")
    assert export.fidelity is not None
    assert export.fidelity.kl_per_token < 1


def test_answers_and_choices_of_a_batch_are_those_of_each_row_alone(tmp_path: Path) -> None:
    from qd2mora.data import prepare
    from qd2mora.evaluation import ask_held_out, open_subject, score_task
    from qd2mora.training import train

    base = tiny.save_base(tmp_path / "base")
    tiny.save_tasks(tmp_path / "data")
    path = tmp_path / "recipe.yaml"
    path.write_text(tiny.recipe_text(base, tmp_path / "data", tmp_path / "run"), encoding="utf-8")
    recipe = load_recipe(path, ["data.tasks.0.metric=choice", "data.tasks.1.metric=exact"])
    train(recipe)
    subject = open_subject(tmp_path / "run")
    for task in ask_held_out(prepare(recipe.data, subject.tokenizer, 0)):
        whole, alone = score_task(subject, task), score_task(subject, task, rows_at_once=1)
        for one, two in zip(whole.records, alone.records, strict=True):
            assert one.loss == pytest.approx(two.loss, rel=3e-2)  # bfloat16 products in another order


@pytest.fixture
def small_run(tmp_path: Path) -> Callable[..., Recipe]:
    """A recipe over a tiny base, in a folder of its own for each name."""
    base = tiny.save_base(tmp_path / "base", tied=False)
    tiny.save_tasks(tmp_path / "data")

    def recipe_of(name: str, *overrides: str) -> Recipe:
        path = tmp_path / f"{name}.yaml"
        path.write_text(tiny.recipe_text(base, tmp_path / "data", tmp_path / name), encoding="utf-8")
        return load_recipe(path, list(overrides))

    return recipe_of


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "paged_adamw_8bit"])
def test_a_run_that_was_broken_off_ends_with_the_bytes_of_an_unbroken_one(
    small_run: Callable[..., Recipe], optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qd2mora.training import train

    whole, broken = (small_run(name, f"train.optimizer={optimizer}") for name in ("whole", "broken"))
    train(whole)
    train_in_two(broken, 3, monkeypatch)
    wanted, found = (load_file(Path(each.output) / "adapter" / WEIGHTS) for each in (whole, broken))
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_a_run_reserves_no_more_than_was_planned(small_run: Callable[..., Recipe]) -> None:
    from qd2mora.memory.ledger import CUDA_CONTEXT
    from qd2mora.training import train

    recipe = small_run("reserved")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    train(recipe)
    planned = json.loads((Path(recipe.output) / "manifest.json").read_text(encoding="utf-8"))["plan"]
    rounding = 64 << 20  # the allocator's blocks, which are whole MiB where this model's tensors are KiB
    assert torch.cuda.max_memory_allocated() <= planned["peak_bytes"] - CUDA_CONTEXT + rounding


@pytest.mark.parametrize(
    "overrides",
    [
        ["memory.offload.weights=stream"],
        ["memory.offload.weights=stream", "memory.accumulation=layer", "train.micro_batch=1"],
        ["memory.offload.embeddings=cpu"],
        ["memory.checkpointing=on", "memory.offload.activations=cpu"],
    ],
)
def test_wherever_layers_lie_a_run_learns_the_same(small_run: Callable[..., Recipe], overrides: list[str]) -> None:
    from qd2mora.training import train

    here, there = train(small_run("here")), train(small_run("there", *overrides))
    for task, loss in here.eval_loss.items():
        assert there.eval_loss[task] == pytest.approx(loss, rel=1e-3)


def test_pinned_pages_are_those_of_the_buffers() -> None:
    from qd2mora.memory.pinned import host_buffer

    class Owner:
        """Keeps the pages registered."""

    owner = Owner()
    buffer = host_buffer(owner, ((3 << 20) + 12345,), torch.uint8, is_pinned=True)
    assert buffer.is_pinned()
    target = torch.empty(len(buffer), dtype=torch.uint8, device="cuda")
    buffer.random_(0, 255)
    target.copy_(buffer, non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(target.cpu(), buffer)
