"""The adapter's life in PEFT: adding, saving, loading, naming, switching, merging, or refusing to merge."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from torch import Tensor, nn

from qd2mora.base import SHAPES, enable_checkpointing, load_base, random_base
from qd2mora.errors import InputRefused
from qd2mora.mixture import MixtureConfig, add_adapter, mixture_layers
from qd2mora.recipe import Base

TARGETS = ["q_proj", "v_proj", "down_proj"]
IDS = torch.arange(3, 27).view(2, 12)


def dense_base() -> nn.Module:
    return random_base(SHAPES["tiny"], Base(model="random:tiny", quantization="none"), torch.device("cpu"))


def nf4_base() -> nn.Module:
    return load_base(Base(model="random:tiny"))


def config(method: str = "d2mora", **changes: object) -> MixtureConfig:
    return MixtureConfig(method=method, rank=4, alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM", **changes)


def wake(model: nn.Module, seed: int = 0) -> None:
    """Give every adapter tensor random values, so that the adapter does something."""
    torch.manual_seed(seed)
    for name, tensor in model.named_parameters():
        if "mixture_" in name:
            nn.init.normal_(tensor, std=0.3)


def logits(model: nn.Module, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, **inputs).logits


@pytest.mark.parametrize("make", [dense_base, nf4_base])
def test_saving_and_loading_is_bitwise(make, tmp_path: Path) -> None:
    model = get_peft_model(make(), config()).eval()
    wake(model)
    before = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(make(), tmp_path).eval()), before)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors", ".md"}


def test_saved_tensors_have_the_promised_names_and_shapes(tmp_path: Path) -> None:
    get_peft_model(nf4_base(), config(down={"experts": 3}, up={"experts": 2})).save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    last_parts = {name.rpartition(".")[2] for name in shapes}
    assert last_parts == {"mixture_A", "mixture_B", "mixture_router_down", "mixture_router_up"}
    prefix = "base_model.model.model.layers.1.mlp.down_proj."
    assert shapes[prefix + "mixture_A"] == (3, 4, 192)
    assert shapes[prefix + "mixture_B"] == (2, 64, 4)
    assert shapes[prefix + "mixture_router_down"] == (3, 192)
    assert shapes[prefix + "mixture_router_up"] == (2, 4)


@pytest.mark.parametrize(
    "imports", ["import qd2mora; from peft import PeftModel", "from peft import PeftModel; import qd2mora"]
)
def test_an_adapter_loads_in_a_fresh_process_whatever_is_imported_first(imports: str, tmp_path: Path) -> None:
    base = dense_base()
    base.save_pretrained(tmp_path / "base")
    get_peft_model(base, config()).save_pretrained(tmp_path / "adapter")
    code = f"""{imports}
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({str(tmp_path / "base")!r}),
                                  {str(tmp_path / "adapter")!r})
print(type(model.base_model).__name__)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["MixtureModel"], done.stderr


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, qd2mora; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_several_adapters_of_different_methods_live_side_by_side(tmp_path: Path) -> None:
    model = get_peft_model(nf4_base(), config()).eval()
    base = logits(model)
    model.add_adapter("other", config("hydralora"))
    wake(model)
    first = logits(model)
    model.set_adapter("other")
    second = logits(model)
    assert not torch.allclose(first, second)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(nf4_base(), tmp_path / "other").eval()
    assert torch.equal(logits(again), second)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    model.set_adapter("other")
    model.delete_adapter("default")
    assert torch.equal(logits(model), second)


def test_only_the_adapter_is_trainable() -> None:
    model = get_peft_model(nf4_base(), config())
    trainable = [name for name, tensor in model.named_parameters() if tensor.requires_grad]
    assert trainable and all(".mixture_" in name for name in trainable)


@pytest.mark.parametrize("method", ["d2mora", "hydralora"])
def test_merging_a_routed_adapter_is_refused_with_the_reason(method: str) -> None:
    model = get_peft_model(dense_base(), config(method))
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match="depends on the token"):
            merge()


@pytest.mark.parametrize("method", ["lora", "moslora"])
def test_merging_a_static_adapter_is_exact_and_can_be_undone(method: str) -> None:
    model = get_peft_model(dense_base(), config(method)).eval()
    wake(model)
    before = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.merge_and_unload()(input_ids=IDS).logits, before, rtol=1e-4, atol=1e-5)


def test_merging_into_4_bit_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="qd2mora merge"):
        get_peft_model(nf4_base(), config("lora")).merge_adapter()


def test_a_target_that_matches_nothing_is_refused_by_name() -> None:
    with pytest.raises(InputRefused, match=r"q_prjo.*q_proj"):
        add_adapter(nf4_base(), MixtureConfig(target_modules=["v_proj", "q_prjo"]), seed=0)


def test_initial_values_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    one = add_adapter(nf4_base(), config(), seed=7)
    torch.manual_seed(2)
    two = add_adapter(nf4_base(), config(), seed=7)
    other = add_adapter(nf4_base(), config(), seed=8)
    banks = [next(iter(mixture_layers(model).values())).tensors("default")["mixture_A"] for model in (one, two, other)]
    assert torch.equal(banks[0], banks[1])
    assert not torch.equal(banks[0], banks[2])


def test_recomputing_layers_gives_the_same_gradients() -> None:
    results = []
    for recompute in (False, True):
        base = nf4_base()
        model = add_adapter(base, config(dropout=0.3), seed=0)
        wake(model)
        if recompute:
            enable_checkpointing(base)
        model.train()
        torch.manual_seed(3)
        model(input_ids=IDS, labels=IDS).loss.backward()
        results.append([tensor.grad for tensor in model.parameters() if tensor.requires_grad])
    for kept, recomputed in zip(*results, strict=True):
        assert torch.equal(kept, recomputed)


def test_an_adapter_routed_by_task_answers_by_task() -> None:
    model = get_peft_model(nf4_base(), config("moelora", num_tasks=3)).eval()
    wake(model)
    first, second = (logits(model, task_index=torch.tensor([task, task])) for task in (0, 1))
    mixed = logits(model, task_index=torch.tensor([0, 1]))
    assert not torch.allclose(first, second)
    torch.testing.assert_close(mixed, torch.stack([first[0], second[1]]), rtol=1e-4, atol=1e-5)
