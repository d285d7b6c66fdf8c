"""Composition: each operation's invariants, on adapters that stock PEFT and this package load."""

import json
import re
import sys
from pathlib import Path

import pytest
import tiny
import torch
from exported import adapted, make_run
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qd2mora.cli import main
from qd2mora.composition import ComposeOptions, compose, lego, sub_moe
from qd2mora.composition.extract import truncated
from qd2mora.composition.inputs import read_mixture
from qd2mora.disk.sealed import open_manifest, verify_folder
from qd2mora.errors import InputRefused
from qd2mora.mixture.low_rank import LowRank
from qd2mora.recipe import Base, load_recipe

IDS = torch.arange(4, 24).view(2, 10)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_base(tmp_path_factory.mktemp("composition") / "base", tied=False)


@pytest.fixture(scope="module")
def loras(base: Path) -> list[Path]:
    """Two trained LoRAs of PEFT's, of one rank and on different linears, and one of another rank."""
    folders = []
    for number, (rank, targets) in enumerate(((4, ["q_proj", "up_proj"]), (4, ["q_proj", "v_proj"]), (6, ["q_proj"]))):
        torch.manual_seed(number)
        config = LoraConfig(r=rank, lora_alpha=3 * rank, target_modules=targets, task_type="CAUSAL_LM")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        for name, tensor in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(tensor, std=0.2)
        folders.append(base.parent / f"lora-{number}")
        model.save_pretrained(folders[-1])
    return folders


def logits(base: Path, *folders: Path, weights: list[float] | None = None, kind: str = "cat") -> Tensor:
    """Logits of the base with one adapter, or with PEFT's own combination of several."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folders[0], adapter_name="0")
    for number, folder in enumerate(folders[1:], 1):
        model.load_adapter(str(folder), adapter_name=str(number))
    if weights is not None:
        names = [str(number) for number in range(len(folders))]
        model.add_weighted_adapter(names, weights, "all", combination_type=kind)
        model.set_adapter("all")
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def products(folder: Path) -> dict[str, Tensor]:
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return {
        name: config["lora_alpha"] / config["r"] * tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
        for name in tensors
        if "lora_A" in name
    }


@pytest.mark.parametrize("kind", ["cat", "linear"])
def test_cat_and_linear_are_pefts_own_numbers(kind: str, base: Path, loras: list[Path], tmp_path: Path) -> None:
    before = [(path / "adapter_model.safetensors").read_bytes() for path in loras[:2]]
    compose(kind, [str(each) for each in loras[:2]], tmp_path / "out", ComposeOptions(weights="0.7,0.4"))
    wanted = logits(base, *loras[:2], weights=[0.7, 0.4], kind=kind)
    torch.testing.assert_close(logits(base, tmp_path / "out"), wanted, atol=1e-5, rtol=1e-4)
    assert before == [(path / "adapter_model.safetensors").read_bytes() for path in loras[:2]]


def test_a_weight_of_one_and_zeros_is_that_lora(loras: list[Path], tmp_path: Path) -> None:
    compose("cat", [str(each) for each in loras], tmp_path / "out", ComposeOptions(weights="0,0,1"))
    wanted, found = products(loras[2]), products(tmp_path / "out")
    for name, product in found.items():
        torch.testing.assert_close(product, wanted.get(name, torch.zeros_like(product)))


def test_clustered_ranks_are_lossless_for_copies_and_at_the_full_rank(loras: list[Path], tmp_path: Path) -> None:
    same = [str(loras[0])] * 3
    compose("lego", same, tmp_path / "same", ComposeOptions(rank=4))
    compose("lego", [str(each) for each in loras], tmp_path / "full", ComposeOptions(rank=14))
    compose("cat", [str(each) for each in loras], tmp_path / "cat")
    for wanted, found in ((loras[0], tmp_path / "same"), (tmp_path / "cat", tmp_path / "full")):
        for name, product in products(found).items():
            torch.testing.assert_close(product, products(wanted)[name], atol=1e-5, rtol=1e-4)


def test_clustering_depends_neither_on_the_order_nor_on_how_a_rank_is_written() -> None:
    torch.manual_seed(0)
    centers = torch.randn(3, 20)
    units = centers.repeat_interleave(4, 0) + 0.01 * torch.randn(12, 20)
    down, up = units[:, :8], units[:, 8:].T
    wanted = lego.clustered(LowRank(down, up, 1.0), 3).dense()
    order, sizes = torch.randperm(12), torch.randn(12) * 3
    other = LowRank((sizes[:, None] * down)[order], (up / sizes)[:, order], 1.0)
    torch.testing.assert_close(lego.clustered(other, 3).dense(), wanted, atol=1e-4, rtol=1e-4)
    assert float((wanted - up @ down).norm() / (up @ down).norm()) < 0.02


def test_more_clusters_lose_less(loras: list[Path], tmp_path: Path) -> None:
    compose("cat", [str(each) for each in loras], tmp_path / "cat")
    errors = []
    for rank in (2, 6, 14):
        compose("lego", [str(each) for each in loras], tmp_path / str(rank), ComposeOptions(rank=rank))
        pairs = zip(products(tmp_path / "cat").values(), products(tmp_path / str(rank)).values(), strict=True)
        errors.append(sum(float((a - b).norm()) for a, b in pairs))
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-4


def routed(base: Path, **changes: object) -> PeftModel:
    return adapted(Base(model=str(base), quantization="none"), "loramoe", **changes)


def saved(model: PeftModel, folder: Path) -> tuple[Path, Tensor]:
    model.save_pretrained(folder)
    with torch.no_grad():
        return folder, model(input_ids=IDS).logits


def test_copies_of_experts_become_one_without_any_loss(base: Path, tmp_path: Path) -> None:
    model = routed(base, down={"experts": 5}, up={"experts": 5})
    for name, tensor in model.named_parameters():  # experts 0, 2, 3 are one, 1 and 4 another
        if re.search(r"mixture_(A|B|router_down)", name):
            tensor.data = tensor.data[[0, 1, 0, 0, 1]].clone()
    folder, wanted = saved(model, tmp_path / "five")
    compose("sub", [str(folder)], tmp_path / "two", ComposeOptions(experts=2))
    torch.testing.assert_close(logits(base, tmp_path / "two"), wanted, atol=1e-4, rtol=1e-4)
    config, tensors = read_mixture(str(tmp_path / "two"))
    assert config.num_down == 2 and next(iter(tensors.values()))["mixture_A"].shape[:2] == (2, 4)


def test_every_expert_kept_at_the_full_rank_is_the_same_function(base: Path, tmp_path: Path) -> None:
    folder, wanted = saved(routed(base, down={"experts": 3}, up={"experts": 3}), tmp_path / "three")
    compose("sub", [str(folder)], tmp_path / "again", ComposeOptions(experts=3, rank=4))
    torch.testing.assert_close(logits(base, tmp_path / "again"), wanted, atol=1e-4, rtol=1e-4)


def test_a_merged_pair_is_the_best_of_its_rank_and_larger_ranks_lose_less() -> None:
    torch.manual_seed(0)
    A, B = torch.randn(3, 4, 9, dtype=torch.float64), torch.randn(3, 11, 4, dtype=torch.float64)
    share = torch.full((3,), 1 / 3, dtype=torch.float64)
    mean = (B @ A).mean(0)
    joined = torch.cat(list(B @ A), 1)
    errors = []
    for rank in (1, 3, 6, 11):
        down, up = sub_moe.merged(A, B, share, rank)
        basis = torch.linalg.svd(joined)[0][:, :rank]  # the slow way: the union itself
        torch.testing.assert_close(up @ down, basis @ basis.T @ mean)
        errors.append(float((up @ down - mean).norm()))
    assert sorted(errors, reverse=True) == errors and errors[-1] < 1e-9


def test_experts_that_point_the_same_way_are_put_together() -> None:
    torch.manual_seed(0)
    A, B = torch.randn(2, 3, 9), torch.randn(2, 7, 3)
    turned = torch.linalg.qr(torch.randn(3, 3))[0]
    downs = torch.stack([A[0], A[1], turned @ A[0], 2 * A[1]])
    ups = torch.stack([B[0], B[1], B[0] @ turned.T, B[1]])
    assert sorted(map(sorted, sub_moe.grouped(downs, ups, 2))) == [[0, 2], [1, 3]]


def test_an_upcycled_lora_is_the_same_function_with_experts_of_its_ranks(
    base: Path, loras: list[Path], tmp_path: Path
) -> None:
    compose("upcycle", [str(loras[0])], tmp_path / "out", ComposeOptions(experts=2))
    torch.testing.assert_close(logits(base, tmp_path / "out"), logits(base, loras[0]), atol=1e-5, rtol=1e-4)
    _, tensors = read_mixture(str(tmp_path / "out"))
    one = next(iter(tensors.values()))
    assert one["mixture_A"].shape[:2] == (2, 2) and not one["mixture_A"][0].equal(one["mixture_A"][1])


def test_a_lora_is_extracted_from_the_model_it_was_merged_into(base: Path, loras: list[Path], tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), loras[1])
    model.merge_and_unload().save_pretrained(tmp_path / "tuned")
    done = compose("extract", [str(tmp_path / "tuned"), str(base)], tmp_path / "out", ComposeOptions(rank=4))
    assert done.words.startswith("rank 4 holds 100.0%") and "not in it" not in done.words
    torch.testing.assert_close(logits(base, tmp_path / "out"), logits(base, loras[1]), atol=1e-4, rtol=1e-4)
    less = compose("extract", [str(tmp_path / "tuned"), str(base)], tmp_path / "less", ComposeOptions(rank=2))
    assert not less.words.startswith("rank 2 holds 100")


def test_what_is_composed_is_sealed_and_knows_the_base_of_its_runs(loras: list[Path], tmp_path: Path) -> None:
    run = make_run(tmp_path, "lora")
    compose("cat", [str(run), str(run)], tmp_path / "two")
    compose("upcycle", [str(tmp_path / "two")], tmp_path / "routed", ComposeOptions(experts=2))
    compose("cat", [str(loras[0])], tmp_path / "foreign")
    for name, known in (("two", True), ("routed", True), ("foreign", False)):
        assert verify_folder(tmp_path / name) > 0
        settings = open_manifest(tmp_path / name).get("base")
        assert settings == (load_recipe(run / "recipe.yaml").base.model_dump() if known else None)


def test_what_is_extracted_is_the_nearest_of_its_rank() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(7, 5)
    down, up = truncated(matrix, 2)
    values = torch.linalg.svdvals(matrix)
    assert float((matrix - up @ down).norm()) == pytest.approx(float(values[2:].norm()), rel=1e-5)
    torch.testing.assert_close(down.norm(dim=1), up.norm(dim=0))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["cta", "{0}"], "unknown 'cta'; did you mean 'cat'"),
        (["cat", "{0}", "{1}", "--weights", "1,x"], "--weights: '1,x' will not do: 2 numbers"),
        (["cat", "{0}", "--rank", "3"], "--rank: cat takes none; it takes weights"),
        (["linear", "{0}", "{2}"], "linear adds banks of one rank, these have 4, 6"),
        (["lego", "{0}"], "--rank: lego needs it"),
        (["upcycle", "{0}", "--experts", "3"], "--experts: 4 ranks do not share out among 3"),
        (["sub", "{0}", "--experts", "2"], "is a plain LoRA; a mixture is needed"),
        (["extract", "{0}", "--rank", "2"], "takes the tuned model and its base, 1 given"),
        (["cat", "nowhere"], "'nowhere' holds no adapter"),
        (["extract", "/no/such", "{0}", "--rank", "2"], "extract: the files of '/no/such' are not on this machine"),
        (["linear", "{0}", "--learn", "recipe.yaml"], "--learn: linear takes none; it takes weights"),
        (["lego", "{0}", "--rank", "0"], "Invalid value for '--rank'"),
    ],
)
def test_what_will_not_do_is_one_line_and_exit_code_2(
    arguments: list[str],
    words: str,
    loras: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [argument.format(*loras) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["qd2mora", "compose", *given, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert [words in line for line in capsys.readouterr().err.strip().splitlines()] == [True]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("method", "experts", "words"),
    [
        ("d2mora", 2, "d2mora is no mixture of plain pairs"),
        ("dynmole", 2, "dynmole chooses experts by entropy"),
        ("rocket", 1, "--experts: 1 are fewer than the 2 that a token uses"),
        ("loramoe", 5, "--experts: 5 will not do: from 1 to the 4 there are"),
    ],
)
def test_mixtures_that_do_not_compress_are_refused(
    method: str, experts: int, words: str, base: Path, tmp_path: Path
) -> None:
    model = adapted(Base(model=str(base), quantization="none"), method, down={"experts": 4}, up={"experts": 4})
    folder, _ = saved(model, tmp_path / method)
    with pytest.raises(InputRefused, match=words):
        compose("sub", [str(folder)], tmp_path / "out", ComposeOptions(experts=experts))


def test_pruning_takes_out_the_experts_that_do_nothing_and_keeps_the_bits_of_the_others(
    base: Path, tmp_path: Path
) -> None:
    model = routed(base, down={"experts": 4}, up={"experts": 4}, gates={"down": {"score": "bias"}})
    for name, tensor in model.named_parameters():
        # The router takes experts 0 and 3 alone, and of all of them expert 1 is the largest.
        if "mixture_B" in name:
            tensor.data[1] *= 5
        elif "router_down" in name:
            tensor.data.zero_()
        elif "bias_down" in name:
            tensor.data = torch.tensor([0.0, -40.0, -40.0, 0.0])
    folder, wanted = saved(model, tmp_path / "four")
    tiny.save_tasks(tmp_path / "data")
    recipe = tmp_path / "my.yaml"
    recipe.write_text(tiny.recipe_text(base, tmp_path / "data", tmp_path / "run"), encoding="utf-8")
    done = compose("prune", [str(folder)], tmp_path / "used", ComposeOptions(experts=2, on=recipe))
    assert "did 0.00% of what all do" in done.words
    torch.testing.assert_close(logits(base, tmp_path / "used"), wanted, atol=1e-5, rtol=1e-5)
    before, after = read_mixture(str(folder))[1], read_mixture(str(tmp_path / "used"))[1]
    for name, each in after.items():
        assert torch.equal(each["mixture_B"], before[name]["mixture_B"][[0, 3]])
    compose("prune", [str(folder)], tmp_path / "blind", ComposeOptions(experts=2))
    assert float((logits(base, tmp_path / "blind") - wanted).abs().max()) > 0.01
    with pytest.raises(InputRefused, match="--experts: 5 will not do: from 1 to the 4 there are"):
        compose("prune", [str(folder)], tmp_path / "more", ComposeOptions(experts=5))


def test_experts_are_merged_by_how_much_rows_use_them(base: Path, tmp_path: Path) -> None:
    model = routed(base, down={"experts": 4}, up={"experts": 4}, gates={"down": {"score": "bias"}})
    for name, tensor in model.named_parameters():
        # Experts 0 and 1 point the same way, of sizes 1 and 3, and so do 2 and 3; the router takes 0 and 2 alone.
        if "mixture_A" in name:
            tensor.data = tensor.data[[0, 0, 2, 2]].clone()
        elif "mixture_B" in name:
            tensor.data = torch.stack([tensor.data[0], 3 * tensor.data[0], tensor.data[2], 3 * tensor.data[2]])
        elif "router_down" in name:
            tensor.data.zero_()
        elif "bias_down" in name:
            tensor.data = torch.tensor([0.0, -30.0, 0.0, -30.0])
    folder, wanted = saved(model, tmp_path / "four")
    tiny.save_tasks(tmp_path / "data")
    recipe = tmp_path / "my.yaml"
    recipe.write_text(tiny.recipe_text(base, tmp_path / "data", tmp_path / "run"), encoding="utf-8")
    done = compose("sub", [str(folder)], tmp_path / "used", ComposeOptions(experts=2, on=recipe))
    assert done.words.endswith("weighed by their use on 64 rows")
    torch.testing.assert_close(logits(base, tmp_path / "used"), wanted, atol=1e-3, rtol=1e-3)
    blind = compose("sub", [str(folder)], tmp_path / "alike", ComposeOptions(experts=2))
    assert "all weighed alike" in blind.words
    assert float((logits(base, tmp_path / "alike") - wanted).abs().max()) > 0.05
