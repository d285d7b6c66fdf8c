"""What is known of an adapter's configuration that others wrote."""

import dataclasses
import json
from pathlib import Path

import exported
import pytest
import torch
from peft import PeftConfig
from safetensors.torch import save_file

from qd2mora.adapter_folder import CONFIG, load_foreign_adapter
from qd2mora.base import load_base
from qd2mora.disk.adapter_config import _COMMON, _MIXTURE, check_adapter_config
from qd2mora.errors import InputRefused
from qd2mora.mixture import MixtureConfig
from qd2mora.recipe import load_recipe


def test_every_field_of_a_mixture_has_a_kind_and_a_reach() -> None:
    of_peft = {field.name for field in dataclasses.fields(PeftConfig)}
    own = {field.name for field in dataclasses.fields(MixtureConfig) if field.init} - of_peft
    assert own - _COMMON.keys() - _MIXTURE.keys() == set()


@pytest.mark.parametrize(
    "changes",
    [
        {"core": {"experts": 1 << 20}},
        {"attention_rank": 1 << 20},
        {"core": "x"},
        {"experts": "lora"},
        {"experts": ["dora"]},
    ],
)
def test_sizes_that_no_tensor_has_and_other_words_are_refused(changes: dict[str, object], tmp_path: Path) -> None:
    weights = tmp_path / "adapter_model.safetensors"
    save_file({"base_model.model.x.mixture_A": torch.zeros(2, 4, 8)}, weights, {"format": "pt"})
    content = {"peft_type": "QD2MORA", "method": "comol", "rank": 4}
    check_adapter_config(content, tmp_path / "adapter_config.json", weights)
    with pytest.raises(InputRefused, match=next(iter(changes))):
        check_adapter_config(content | changes, tmp_path / "adapter_config.json", weights)


@pytest.mark.parametrize("changes", [{"down": {"experts": 16}}, {"rank": 8}])
def test_what_a_mixture_asks_for_is_compared_with_its_tensors_before_it_is_made(
    changes: dict[str, object], tmp_path: Path
) -> None:
    run = exported.make_run(tmp_path, "d2mora")
    config = run / "adapter" / CONFIG
    config.write_text(json.dumps(json.loads(config.read_text(encoding="utf-8")) | changes), encoding="utf-8")
    base = load_base(load_recipe(run / "recipe.yaml").base)
    before = [name for name, _ in base.named_parameters()]
    with pytest.raises(InputRefused, match=r"mixture_A' of .*, and adapter_config\.json asks for .*of another adapter"):
        load_foreign_adapter(base, run / "adapter")
    assert [name for name, _ in base.named_parameters()] == before
