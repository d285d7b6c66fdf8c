"""The same product on a CUDA device: what the CPU tests prove, where it will be used."""

from pathlib import Path

import pytest
import tiny
import torch

from qd2mora.base import dense_weight, is_nf4, load_base
from qd2mora.mixture import MixtureConfig, MixtureLinear, Routing
from qd2mora.recipe import Base, load_recipe

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
