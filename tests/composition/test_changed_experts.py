"""Experts of a mixture put in, taken out and made smaller: what stays the same, and what is refused."""

import shutil
from pathlib import Path

import pytest
import tiny
import torch
from exported import adapted
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qd2mora.composition import ComposeOptions, compose
from qd2mora.composition.inputs import read_mixture
from qd2mora.errors import InputRefused, StopError
from qd2mora.recipe import Base

IDS = torch.arange(4, 24).view(2, 10)
FIVE = {"down": {"experts": 5}, "up": {"experts": 5}, "gates": {"down": {"score": "bias"}}}
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_base(tmp_path_factory.mktemp("experts") / "base", tied=False)


@pytest.fixture(scope="module")
def five(base: Path) -> Path:
    """A mixture of five experts, every tensor random."""
    model = adapted(Base(model=str(base), quantization="none"), "loramoe", **FIVE)
    model.save_pretrained(base.parent / "five")
    return base.parent / "five"


def logits(base: Path, folder: Path, without: tuple[int, ...] = ()) -> Tensor:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "mixture_bias_down" in name:
                tensor[list(without)] = -1e9  # a weight of exactly zero
        return model(input_ids=IDS).logits


def test_a_mixture_without_an_expert_is_the_one_whose_logit_is_masked(base: Path, five: Path, tmp_path: Path) -> None:
    compose("drop-expert", [str(five)], tmp_path / "three", ComposeOptions(expert="1,3"))
    torch.testing.assert_close(logits(base, tmp_path / "three"), logits(base, five, (1, 3)), **CLOSE)
    assert (logits(base, five) - logits(base, five, (1, 3))).abs().max() > 1e-3


def test_pruning_the_experts_that_do_nothing_is_dropping_them(base: Path, tmp_path: Path) -> None:
    changes = {key: FIVE[key] for key in ("down", "up")}
    model = adapted(Base(model=str(base), quantization="none"), "scalezero", **changes)
    for name, tensor in model.named_parameters():
        if "mixture_B" in name:
            tensor.data[[1, 3]] = 0  # never opened
    model.save_pretrained(tmp_path / "five")
    compose("prune", [str(tmp_path / "five")], tmp_path / "pruned", ComposeOptions(experts=3))
    compose("drop-expert", [str(tmp_path / "five")], tmp_path / "dropped", ComposeOptions(expert="1,3"))
    torch.testing.assert_close(logits(base, tmp_path / "pruned"), logits(base, tmp_path / "five"), **CLOSE)
    (ours, pruned), (theirs, dropped) = (read_mixture(str(tmp_path / name)) for name in ("pruned", "dropped"))
    assert ours == theirs
    for name, tensors in dropped.items():
        assert tensors.keys() == pruned[name].keys()
        assert all(torch.equal(pruned[name][kind], tensor) for kind, tensor in tensors.items())
    with pytest.raises(InputRefused, match="adds experts of its own"):
        compose("add-expert", [str(tmp_path / "five")] * 2, tmp_path / "out")


@pytest.mark.parametrize("method", ["mora", "smora", "flylora"])
def test_pruning_ranks_that_never_opened_changes_what_their_places_take_alone(
    method: str, base: Path, tmp_path: Path
) -> None:
    model = adapted(Base(model=str(base), quantization="none"), method, rank=12, gates={"rank": {"top_k": 4}})
    for name, tensor in model.named_parameters():
        if "mixture_B" in name:
            tensor.data[..., [0, 3, 5, 7, 8, 9, 11]] = 0
    model.save_pretrained(tmp_path / "all")
    done = compose("prune", [str(tmp_path / "all")], tmp_path / "some", ComposeOptions(experts=5))
    assert "12 ranks became 5; those left out did 0.00%" in done.words
    (config, before), (less, after) = (read_mixture(str(tmp_path / name)) for name in ("all", "some"))
    assert less.rank == 5 and less.scaling == pytest.approx(config.scaling)
    kept = [1, 2, 4, 6, 10]
    for name, tensors in after.items():
        assert torch.equal(tensors["mixture_A"], before[name]["mixture_A"][:, kept])
        assert torch.equal(tensors["mixture_B"], before[name]["mixture_B"][..., kept])
        for key in tensors.keys() - {"mixture_A", "mixture_B"}:
            assert torch.equal(tensors[key], before[name][key][kept]), key
    assert logits(base, tmp_path / "some").isfinite().all()
    with pytest.raises(InputRefused, match="--experts: 3 will not do: from the 4 ranks that a token uses to the 12"):
        compose("prune", [str(tmp_path / "all")], tmp_path / "few", ComposeOptions(experts=3))


def test_an_expert_that_is_a_dora_leaves_with_its_magnitude(base: Path, tmp_path: Path) -> None:
    model = adapted(Base(model=str(base), quantization="none"), "mixlora", experts="dora")
    model.save_pretrained(tmp_path / "all")
    compose("drop-expert", [str(tmp_path / "all")], tmp_path / "some", ComposeOptions(expert="0,5"))
    before, after = (read_mixture(str(tmp_path / name))[1] for name in ("all", "some"))
    for name, tensors in after.items():
        kept = [1, 2, 3, 4, 6, 7] if ".mlp." in name else [0]
        assert torch.equal(tensors["mixture_magnitude"], before[name]["mixture_magnitude"][kept])
    with pytest.raises(InputRefused, match="prune: linears of mixlora share a router; drop-expert"):
        compose("prune", [str(tmp_path / "all")], tmp_path / "out", ComposeOptions(experts=6))


def test_experts_of_two_mixtures_stand_side_by_side_with_their_routers_rows(
    base: Path, five: Path, tmp_path: Path
) -> None:
    compose("drop-expert", [str(five)], tmp_path / "first", ComposeOptions(expert="3,4"))
    compose("drop-expert", [str(five)], tmp_path / "last", ComposeOptions(expert="0,1,2"))
    compose("add-expert", [str(tmp_path / "first"), str(tmp_path / "last")], tmp_path / "all")
    wanted, found = (read_mixture(str(each))[1] for each in (five, tmp_path / "all"))
    for name, tensors in wanted.items():
        for kind, tensor in tensors.items():
            torch.testing.assert_close(found[name][kind], tensor, **CLOSE)
    torch.testing.assert_close(logits(base, tmp_path / "all"), logits(base, five), **CLOSE)


def test_a_lora_becomes_an_expert_with_its_own_scale_and_can_be_dropped_again(
    base: Path, five: Path, tmp_path: Path
) -> None:
    config = LoraConfig(r=6, lora_alpha=3, target_modules=["gate_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, tensor in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(tensor, std=0.2)
    model.save_pretrained(tmp_path / "lora")
    done = compose("add-expert", [str(five), str(tmp_path / "lora")], tmp_path / "six")
    assert "theirs are zero until they are trained" in done.words
    settings, linears = read_mixture(str(tmp_path / "six"))
    assert settings.ranks is not None and settings.ranks[-1] == 6 and settings.num_down == 6
    for name, tensors in linears.items():
        update = settings.scaling * tensors["mixture_B"][:, -6:] @ tensors["mixture_A"][-6:]
        if name.endswith("gate_proj"):
            layer = model.base_model.model.get_submodule(name)
            torch.testing.assert_close(update, layer.get_delta_weight("default"), **CLOSE)
        else:
            assert not update.any()
        assert not tensors["mixture_router_down"][-1].any()
    compose("drop-expert", [str(tmp_path / "six")], tmp_path / "back", ComposeOptions(expert="5"))
    torch.testing.assert_close(logits(base, tmp_path / "back"), logits(base, five), **CLOSE)


def test_an_expert_gets_the_least_rank_that_keeps_its_update(base: Path, tmp_path: Path) -> None:
    model = adapted(Base(model=str(base), quantization="none"), "loramoe", down={"experts": 3}, up={"experts": 3})
    planted = (1, 4, 2)
    for name, tensor in model.named_parameters():
        if "mixture_B" in name:
            for expert, rank in zip(tensor.data, planted, strict=True):
                # Columns that repeat others: the product has that rank, the bank does not show it.
                expert.copy_(expert[:, [column % rank for column in range(4)]])
        if "mixture_A" in name:
            for expert, rank in zip(tensor.data, planted, strict=True):
                expert.copy_(expert[[row % rank for row in range(4)]])
    model.save_pretrained(tmp_path / "three")
    done = compose("pick-ranks", [str(tmp_path / "three")], tmp_path / "picked", ComposeOptions(energy=0.99999))
    assert read_mixture(str(tmp_path / "picked"))[0].ranks == [1, 4, 2]
    assert done.words == "loramoe: 3 experts of ranks 1, 4, 2; 100.00% of the updates' energy is kept"
    torch.testing.assert_close(logits(base, tmp_path / "picked"), logits(base, tmp_path / "three"), **CLOSE)
    compose("pick-ranks", [str(tmp_path / "three")], tmp_path / "two", ComposeOptions(energy=1.0, rank=2))
    assert read_mixture(str(tmp_path / "two"))[0].ranks == [1, 2, 2]


@pytest.mark.long
def test_attention_keeps_its_update_where_the_experts_of_mlps_get_smaller(base: Path, tmp_path: Path) -> None:
    model = adapted(Base(model=str(base), quantization="none"), "mixlora")
    for name, tensor in model.named_parameters():
        if name.endswith("mixture_B.default") and ".mlp." in name:
            tensor.data[..., 2:] = 0  # of rank 2
    model.save_pretrained(tmp_path / "four")
    compose("pick-ranks", [str(tmp_path / "four")], tmp_path / "two", ComposeOptions(energy=0.9999))
    config = read_mixture(str(tmp_path / "two"))[0]
    assert (config.rank, config.ranks, config.attention_rank) == (2, None, 4)
    torch.testing.assert_close(logits(base, tmp_path / "two"), logits(base, tmp_path / "four"), **CLOSE)


@pytest.mark.long
def test_the_base_stays_the_first_expert_of_flexmore_whatever_is_done(base: Path, tmp_path: Path) -> None:
    targets = ["gate_proj", "up_proj", "down_proj"]
    changes = {"ranks": [0, 2, 3], "rank": None, "target_modules": targets}
    model = adapted(Base(model=str(base), quantization="none"), "flexmore", **changes)
    model.save_pretrained(tmp_path / "three")
    compose("pick-ranks", [str(tmp_path / "three")], tmp_path / "picked", ComposeOptions(energy=1.0))
    torch.testing.assert_close(logits(base, tmp_path / "picked"), logits(base, tmp_path / "three"), **CLOSE)
    compose("drop-expert", [str(tmp_path / "three")], tmp_path / "two", ComposeOptions(expert="1"))
    compose("add-expert", [str(tmp_path / "two"), str(tmp_path / "two")], tmp_path / "twice")
    assert read_mixture(str(tmp_path / "two"))[0].ranks == [0, 3]
    assert read_mixture(str(tmp_path / "twice"))[0].ranks == [0, 3, 3]
    with pytest.raises(InputRefused, match="--expert: 0 will not do: from 1 to 2"):
        compose("drop-expert", [str(tmp_path / "three")], tmp_path / "none", ComposeOptions(expert="0"))


def test_doras_and_plain_experts_do_not_stand_in_one_mixture(base: Path, tmp_path: Path) -> None:
    mlp = {"target_modules": ["gate_proj", "up_proj", "down_proj"]}
    for name, more in (("dora", {"experts": "dora"}), ("plain", {})):
        adapted(Base(model=str(base), quantization="none"), "mixlora", **mlp, **more).save_pretrained(tmp_path / name)
    for pair in (("dora", "plain"), ("plain", "dora")):
        with pytest.raises(InputRefused, match="experts of one mixture are DoRAs"):
            compose("add-expert", [str(tmp_path / name) for name in pair], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("operation", ["drop-expert", "prune", "pick-ranks", "add-expert", "sub"])
@pytest.mark.parametrize("lost", ["mixture_B", "mixture_router_down", "mixture_bias_down"])
def test_a_folder_that_lacks_a_tensor_is_refused(operation: str, lost: str, five: Path, tmp_path: Path) -> None:
    shutil.copytree(five, tmp_path / "five")
    weights = tmp_path / "five" / "adapter_model.safetensors"
    tensors = load_file(weights)
    first = next(name for name in tensors if name.endswith(lost))
    del tensors[first]
    save_file(tensors, weights)
    given = {"drop-expert": {"expert": "1"}, "pick-ranks": {"energy": 0.9}, "add-expert": {}}
    options = ComposeOptions(**given.get(operation, {"experts": 3}))
    with pytest.raises(InputRefused, match="does not hold the tensors that its config asks for"):
        compose(operation, [str(tmp_path / "five")] * (1 + (operation == "add-expert")), tmp_path / "out", options)
    assert not (tmp_path / "out").exists()


def test_a_configuration_that_is_no_json_is_refused_before_it_is_read(five: Path, tmp_path: Path) -> None:
    shutil.copytree(five, tmp_path / "five")
    (tmp_path / "five" / "adapter_config.json").write_text("{", encoding="utf-8")
    for operation in ("add-expert", "linear", "average"):
        with pytest.raises(StopError, match=r"adapter_config\.json"):
            compose(operation, [str(tmp_path / "five")] * 2, tmp_path / "out")


def test_layers_with_different_numbers_of_experts_are_told_apart_from_what_has_no_pairs(
    base: Path, tmp_path: Path
) -> None:
    adapted(Base(model=str(base), quantization="none"), "mola", allocation="2-4").save_pretrained(tmp_path / "mola")
    with pytest.raises(InputRefused, match=r"adapter\.allocation 2-4 gives layers different numbers of experts"):
        compose("prune", [str(tmp_path / "mola")], tmp_path / "out", ComposeOptions(experts=2))


@pytest.mark.parametrize(
    ("operation", "options", "words"),
    [
        ("drop-expert", {"expert": "5"}, "--expert: 5 will not do: from 0 to 4"),
        ("drop-expert", {"expert": "a"}, "--expert: 'a' will not do: numbers of experts"),
        ("drop-expert", {"expert": "0,1,2,3"}, "1 of 5 experts would be left"),
        ("drop-expert", {}, "--expert: drop-expert needs it, numbers of experts"),
        ("pick-ranks", {"energy": 1.5}, "--energy: 1.5 will not do"),
        ("add-expert", {}, "takes a mixture and what is added to it"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    operation: str, options: dict[str, object], words: str, five: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputRefused, match=words):
        compose(operation, [str(five)], tmp_path / "out", ComposeOptions(**options))
    assert not (tmp_path / "out").exists()
