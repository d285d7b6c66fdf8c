"""The adapter's life in PEFT: adding, saving, loading, naming, switching, merging, or refusing to merge."""

import subprocess
import sys
from pathlib import Path

import pytest
import reference
import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from qd2mora.base import SHAPES, load_base, random_base
from qd2mora.errors import InputRefused
from qd2mora.memory.checkpointing import enable_checkpointing
from qd2mora.mixture import MixtureConfig, add_adapter, mixture_layers
from qd2mora.recipe import Base

METHODS = ["d2mora", "lora", "hydralora", "moslora", "moelora"]
TARGETS = ["q_proj", "v_proj", "down_proj"]
TASKS = torch.tensor([2, 0])
IDS = torch.arange(3, 27).view(2, 12)


def dense_base() -> nn.Module:
    return random_base(SHAPES["tiny"], Base(model="random:tiny", quantization="none"), torch.device("cpu"))


def nf4_base() -> nn.Module:
    return load_base(Base(model="random:tiny"))


def config(method: str = "d2mora", **changes: object) -> MixtureConfig:
    settings: dict[str, object] = {"rank": 4, "alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    if method == "moelora":
        settings["num_tasks"] = 3
    return MixtureConfig(method=method, **(settings | changes))


def routed(method: str) -> dict[str, Tensor]:
    """What a forward of this method takes beside the ids."""
    return {"task_index": TASKS} if method == "moelora" else {}


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of each adapted linear's base weight."""
    return {name: layer.get_base_layer().weight.detach().clone() for name, layer in mixture_layers(model).items()}


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
@pytest.mark.parametrize("method", METHODS)
def test_an_adapted_model_starts_as_its_base(make, method: str) -> None:
    before = logits(make())
    model = get_peft_model(make(), config(method)).eval()
    assert torch.equal(logits(model, **routed(method)), before)
    wake(model)
    assert not torch.allclose(logits(model, **routed(method)), before, atol=1e-3)


@pytest.mark.parametrize("make", [dense_base, nf4_base])
@pytest.mark.parametrize("method", METHODS)
def test_saving_and_loading_is_bitwise(make, method: str, tmp_path: Path) -> None:
    model = get_peft_model(make(), config(method)).eval()
    wake(model)
    before = logits(model, **routed(method))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make(), tmp_path).eval()
    assert torch.equal(logits(again, **routed(method)), before)
    ours, theirs = ({n: t for n, t in m.named_parameters() if "mixture_" in n} for m in (model, again))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert again.peft_config["default"].method == method
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors", ".md"}


D2MORA = {
    "mixture_A": (3, 4, 192),
    "mixture_B": (2, 64, 4),
    "mixture_router_down": (3, 192),
    "mixture_router_up": (2, 4),
}
SHAPES_SAVED = {
    "d2mora": D2MORA,
    "lora": {"mixture_A": (1, 4, 192), "mixture_B": (1, 64, 4)},
    "hydralora": {"mixture_A": (1, 4, 192), "mixture_B": (2, 64, 4), "mixture_router_up": (2, 192)},
    "moslora": {"mixture_A": (1, 4, 192), "mixture_B": (1, 64, 4), "mixture_core": (4, 4)},
    "moelora": {
        "mixture_A": (2, 4, 192),
        "mixture_B": (2, 64, 4),
        "mixture_task_embedding": (4, 32),
        "mixture_router_task": (2, 32),
    },
}


@pytest.mark.parametrize("method", METHODS)
def test_saved_tensors_have_the_promised_names_and_shapes(method: str, tmp_path: Path) -> None:
    wanted = SHAPES_SAVED[method]
    down, up = ({"experts": wanted[bank][0]} for bank in ("mixture_A", "mixture_B"))
    get_peft_model(nf4_base(), config(method, down=down, up=up)).save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    prefix = "base_model.model.model.layers.1.mlp.down_proj."
    assert {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)} == wanted
    # Two layers of three adapted linears, and nothing besides.
    assert len(shapes) == 2 * 3 * len(wanted)


# PEFT first is the order that could miss the registration; the other is that of every run of `tests/reliability`.
@pytest.mark.parametrize(
    "imports",
    [
        pytest.param("import qd2mora; from peft import PeftModel", marks=pytest.mark.long),
        "from peft import PeftModel; import qd2mora",
    ],
)
def test_an_adapter_answers_the_same_in_a_fresh_process_whatever_is_imported_first(
    imports: str, tmp_path: Path
) -> None:
    base = dense_base()
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, config()).eval()
    wake(model)
    model.save_pretrained(tmp_path / "adapter")
    code = f"""{imports}
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "adapter").eval()
with torch.no_grad():
    save_file({{"logits": model(torch.arange(3, 27).view(2, 12)).logits}}, "out.safetensors")
print(type(model.base_model).__name__)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["MixtureModel"], done.stderr
    assert torch.equal(load_file(tmp_path / "out.safetensors")["logits"], logits(model))


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, qd2mora; print(sorted({'torch', 'peft', 'transformers', 'bitsandbytes'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["[]"], done.stderr


def test_several_adapters_of_different_methods_live_side_by_side(tmp_path: Path) -> None:
    methods = {"default": "d2mora", "shared": "hydralora", "by_task": "moelora", "plain": "lora"}
    model = get_peft_model(nf4_base(), config()).eval()
    base = logits(model)
    for name, method in list(methods.items())[1:]:
        model.add_adapter(name, config(method))
    wake(model)
    answers = {}
    for name, method in methods.items():
        model.set_adapter(name)
        answers[name] = logits(model, **routed(method))
        trainable = [key for key, tensor in model.named_parameters() if tensor.requires_grad]
        assert trainable and all(".mixture_" in key and key.endswith(f".{name}") for key in trainable)
        with model.disable_adapter():
            assert torch.equal(logits(model), base)
    for one in answers:
        for other in answers:
            assert (one == other) == torch.allclose(answers[one], answers[other], atol=1e-3)
    model.save_pretrained(tmp_path)
    for name, method in methods.items():
        model.set_adapter(name)
        assert torch.equal(logits(model, **routed(method)), answers[name])
        folder = tmp_path if name == "default" else tmp_path / name
        again = PeftModel.from_pretrained(nf4_base(), folder).eval()
        assert torch.equal(logits(again, **routed(method)), answers[name])


def test_deleting_an_adapter_leaves_the_others_and_none_of_its_tensors() -> None:
    model = get_peft_model(nf4_base(), config()).eval()
    model.add_adapter("other", config("hydralora"))
    wake(model)
    model.set_adapter("other")
    before = logits(model)
    model.delete_adapter("default")
    assert torch.equal(logits(model), before)
    assert not [name for name, _ in model.named_parameters() if name.endswith(".default")]
    assert [list(layer.mixture_config) for layer in mixture_layers(model).values()] == [["other"]] * 6


def test_adapters_on_different_linears_share_a_model() -> None:
    model = get_peft_model(dense_base(), config("lora", target_modules=["q_proj"])).eval()
    model.add_adapter("other", config("lora", target_modules=["v_proj"]))
    wake(model)
    model.set_adapter("other")
    before, weights = logits(model), weights_of(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    changed = {name for name, weight in weights_of(model).items() if not torch.equal(weight, weights[name])}
    assert changed == {name for name in weights if name.endswith("v_proj")}


def test_only_the_adapter_is_trainable() -> None:
    model = get_peft_model(nf4_base(), config())
    trainable = [name for name, tensor in model.named_parameters() if tensor.requires_grad]
    assert trainable and all(".mixture_" in name for name in trainable)


@pytest.mark.parametrize("method", ["d2mora", "hydralora", "moelora"])
def test_merging_a_routed_adapter_is_refused_with_the_reason(method: str) -> None:
    model = get_peft_model(dense_base(), config(method)).eval()
    wake(model)
    before = logits(model, **routed(method))
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match="depends on the " + ("task" if method == "moelora" else "token")):
            merge()
    assert torch.equal(logits(model, **routed(method)), before)


def test_a_merge_that_names_a_routed_adapter_changes_nothing() -> None:
    model = get_peft_model(dense_base(), config("lora")).eval()
    model.add_adapter("routed", config("d2mora"))
    wake(model)
    before, weights = logits(model), weights_of(model)
    with pytest.raises(ValueError, match="depends on the token"):
        model.merge_adapter(adapter_names=["default", "routed"])
    assert all(torch.equal(weight, weights[name]) for name, weight in weights_of(model).items())
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("method", ["lora", "moslora"])
def test_merging_a_static_adapter_is_exact_and_can_be_undone(method: str) -> None:
    model = get_peft_model(dense_base(), config(method)).eval()
    with model.disable_adapter():
        base = logits(model)
    wake(model)
    before, weights = logits(model), weights_of(model)
    model.merge_adapter()
    for name, layer in mixture_layers(model).items():
        tensors = {key: tensor.detach().double() for key, tensor in layer.tensors("default").items()}
        identity = torch.eye(layer.in_features, dtype=torch.float64)
        wanted = weights[name].double() + reference.delta(method, identity, tensors, 8 / 4).T
        torch.testing.assert_close(layer.get_base_layer().weight.double(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), base, rtol=1e-4, atol=1e-5)
    model.merge_adapter()
    model.unmerge_adapter()
    for name, weight in weights_of(model).items():
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    merged = model.merge_and_unload()
    assert not [name for name, _ in merged.named_parameters() if "mixture_" in name]
    torch.testing.assert_close(merged(input_ids=IDS).logits, before, rtol=1e-4, atol=1e-5)


def test_a_safe_merge_refuses_weights_that_are_not_finite() -> None:
    model = get_peft_model(dense_base(), config("lora"))
    weights = weights_of(model)
    layer = mixture_layers(model)["model.layers.0.self_attn.q_proj"]
    layer.tensors("default")["mixture_A"].data.fill_(float("inf"))
    with pytest.raises(ValueError, match="not finite"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.get_base_layer().weight, weights["model.layers.0.self_attn.q_proj"])


@pytest.mark.parametrize("method", ["lora", "moslora"])
def test_merging_into_4_bit_weights_is_refused(method: str) -> None:
    model = get_peft_model(nf4_base(), config(method)).eval()
    wake(model)
    before = logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="qd2mora merge"):
            merge()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("targets", [["v_proj", "q_prjo"], r".*\.q_prjo"], ids=["list", "pattern"])
def test_a_target_that_matches_nothing_is_refused_by_name(targets: list[str] | str) -> None:
    with pytest.raises(InputRefused, match=r"q_prjo.*q_proj"):
        add_adapter(nf4_base(), MixtureConfig(target_modules=targets), seed=0)


@pytest.mark.parametrize(
    ("targets", "number"), [(["q_proj", "self_attn.v_proj"], 4), (r".*layers\.1\..*_proj", 7), ("all-linear", 14)]
)
def test_targets_are_names_a_pattern_or_all_linears(targets: list[str] | str, number: int) -> None:
    model = add_adapter(nf4_base(), MixtureConfig(target_modules=targets, task_type="CAUSAL_LM"), seed=0)
    assert len(mixture_layers(model)) == number


def test_initial_values_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    one = add_adapter(nf4_base(), config(), seed=7)
    torch.manual_seed(2)
    two = add_adapter(nf4_base(), config(), seed=7)
    other = add_adapter(nf4_base(), config(), seed=8)
    banks = [next(iter(mixture_layers(model).values())).tensors("default")["mixture_A"] for model in (one, two, other)]
    assert torch.equal(banks[0], banks[1])
    assert not torch.equal(banks[0], banks[2])


@pytest.mark.parametrize("method", ["d2mora", "moelora"])
def test_recomputing_layers_gives_the_same_gradients(method: str) -> None:
    results = []
    for recompute in (False, True):
        base = nf4_base()
        model = add_adapter(base, config(method, dropout=0.3), seed=0)
        wake(model)
        if recompute:
            enable_checkpointing(base)
        assert base.is_gradient_checkpointing is recompute
        model.train()
        torch.manual_seed(3)
        model(input_ids=IDS, labels=IDS, **routed(method)).loss.backward()
        results.append([tensor.grad for tensor in model.parameters() if tensor.requires_grad])
    for kept, recomputed in zip(*results, strict=True):
        assert kept.any()
        assert torch.equal(kept, recomputed)


@pytest.mark.parametrize("method", METHODS)
def test_decoding_with_a_cache_equals_one_pass(method: str) -> None:
    model = get_peft_model(nf4_base(), config(method)).eval()
    wake(model)
    whole, cache = logits(model, **routed(method)), None
    for position in range(IDS.shape[1]):
        with torch.no_grad():
            out = model(IDS[:, position : position + 1], past_key_values=cache, use_cache=True, **routed(method))
        cache = out.past_key_values
        torch.testing.assert_close(out.logits[:, 0], whole[:, position], rtol=1e-4, atol=1e-4)


def test_an_adapter_routed_by_task_answers_by_task() -> None:
    model = get_peft_model(nf4_base(), config("moelora", num_tasks=3)).eval()
    wake(model)
    first, second = (logits(model, task_index=torch.tensor([task, task])) for task in (0, 1))
    mixed = logits(model, task_index=torch.tensor([0, 1]))
    assert not torch.allclose(first, second)
    torch.testing.assert_close(mixed, torch.stack([first[0], second[1]]), rtol=1e-4, atol=1e-5)


def test_a_missing_or_unknown_task_is_refused_even_after_a_known_one() -> None:
    model = get_peft_model(nf4_base(), config("moelora", num_tasks=3)).eval()
    for _ in range(2):
        with pytest.raises(ValueError, match="task_index"):
            logits(model)
        for outside in (3, -1):
            with pytest.raises(ValueError, match="outside"):
                logits(model, task_index=torch.tensor([0, outside]))
        logits(model, task_index=torch.tensor([2, 0]))
