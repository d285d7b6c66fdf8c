"""Arms are what they are called: their own linears, scale and part of ranks in use; a file names more of them."""

from pathlib import Path

import pytest
from test_cli import run as run_cli

from qd2mora.comparison.arms_file import read_arms
from qd2mora.comparison.matched_arms import COARSE, LIMIT, Arm, matched_arms
from qd2mora.errors import InputRefused
from qd2mora.memory import plan
from qd2mora.mixture import MixtureConfig
from qd2mora.mixture.counts import llama_linears, routed_linears
from qd2mora.mixture.presets import METHODS
from qd2mora.recipe import Recipe, load_recipe

QKV = "adapter.targets=[q_proj, k_proj, v_proj]"
ON_7B = ("base.model=random:llama-7b", "adapter.rank=16", "adapter.alpha=32", QKV)


def recipe_of(made: Path, *changes: str) -> Recipe:
    return load_recipe(made / "recipe.yaml", ["train.steps=2", *changes])


def config_of(arm: Arm) -> MixtureConfig:
    return MixtureConfig.from_recipe(arm.adapter, 2)


def arm_of(recipe: Recipe, method: str) -> Arm:
    return matched_arms(recipe, ["d2mora", method])[1]


@pytest.mark.parametrize("method", ["mixlora", "llava_mole"])
def test_a_mixture_in_mlps_is_no_lora_because_the_recipe_adapts_attention(method: str, made: Path) -> None:
    arm = arm_of(recipe_of(made, *ON_7B), method)
    linears = llama_linears(4096, 11008, 4096, 4096)
    assert routed_linears(config_of(arm), linears, 32, 4096) == 3 * 32
    assert "on its own linears" in arm.notes[0] and "gate_proj" in arm.notes[0]
    with pytest.raises(InputRefused, match=f"--methods: {method} has no routed expert on k_proj, q_proj, v_proj"):
        matched_arms(recipe_of(made, *ON_7B), ["d2mora", method], targets="recipe")


@pytest.mark.parametrize("base", [(QKV,), ON_7B])
def test_moelora_scales_its_update_as_its_repository(base: tuple[str, ...], made: Path) -> None:
    assert config_of(arm_of(recipe_of(made, *base), "moelora")).scaling == pytest.approx(2.0)


def test_ept_is_matched_by_the_rank_of_its_seed_and_keeps_an_expert_of_each_scale(made: Path) -> None:
    arm = arm_of(recipe_of(made, *ON_7B), "ept")
    config = config_of(arm)
    assert config.num_down == config.num_up == len(METHODS["ept"].scales) == 8
    assert config.scaling == pytest.approx(METHODS["ept"].scaling)


def test_flexmore_is_matched_by_its_largest_rank_and_the_others_keep_their_part_of_it(made: Path) -> None:
    config = config_of(arm_of(recipe_of(made, *ON_7B), "flexmore"))
    assert config.ranks is not None and config.ranks[0] == 0 and config.rank == max(config.ranks)
    assert config.ranks[1:] == [max(1, round(config.rank * part)) for part in (1 / 8, 1 / 4, 1 / 2, 1)]
    assert config.scaling == pytest.approx(METHODS["flexmore"].scaling)


def test_remix_weighs_by_two_over_k_times_the_rank_that_is_found(made: Path) -> None:
    config = config_of(arm_of(recipe_of(made, *ON_7B), "remix"))
    assert config.rank is not None and config.rank != 8
    assert config.scaling == pytest.approx(2 / config.rank)


@pytest.mark.parametrize(("method", "part"), [("flylora", 8 / 32), ("mora", 8 / 32), ("smora", 8 / 64)])
@pytest.mark.parametrize("base", [(), ON_7B])
def test_a_choice_among_ranks_keeps_its_part_of_them(
    method: str, part: float, base: tuple[str, ...], made: Path
) -> None:
    """On small bases too, where a choice of so many ranks as the row says would be one among fewer."""
    arm = arm_of(recipe_of(made, *base), method)
    config = config_of(arm)
    assert config.rank is not None
    used = config.routers["rank"].top_k
    assert used == max(1, int(part * config.rank + 0.5)) and used < config.rank
    assert config.scaling == pytest.approx(2.0)  # SMoRA's alpha is over what is used


@pytest.mark.long
def test_mola_keeps_its_shape_and_shrinks_where_the_base_is_small(made: Path) -> None:
    on_7b = config_of(arm_of(recipe_of(made, *ON_7B), "mola"))
    assert on_7b.allocation is not None
    groups = [int(group) for group in on_7b.allocation.split("-")]
    assert len(groups) == 4 and groups == sorted(groups) and groups[0] < groups[-1]
    small = config_of(arm_of(recipe_of(made), "mola"))  # two layers
    assert small.allocation == "2-2" and small.routers["down"].top_k == 2


def test_arms_of_a_file_are_matched_by_rank_with_what_they_say(made: Path, tmp_path: Path) -> None:
    (tmp_path / "arms.yaml").write_text(
        """
few: {method: d2mora, down: {experts: 2}, up: {experts: 2}, gates: {down: {temperature: 0.5}}}
beside: {method: hydralora, up: {experts: 3}, shared: {part: 0.4}, scale: 1.5}
lora-plus: {method: lora, rank_stabilized: true, train: {rates: {up: 16}, weight_decay: 0.1, optimizer: adamw_8bit}}
cores: {method: residual_cores, core: {experts: 2}, dropout: 0.1}
fixed: {method: lora, rank: 3}
""",
        encoding="utf-8",
    )
    recipe = recipe_of(made, *ON_7B)
    wishes = read_arms(tmp_path / "arms.yaml", recipe)
    arms = {arm.name: arm for arm in matched_arms(recipe, ["d2mora", *wishes], wishes)}
    wanted = arms["d2mora"].parameters
    for name, arm in arms.items():
        assert plan(recipe.model_copy(update={"adapter": arm.adapter})).trainable_parameters == arm.parameters
        assert name == "fixed" or abs(arm.parameters - wanted) <= LIMIT * wanted
    assert config_of(arms["few"]).routers["down"].temperature == 0.5
    beside = config_of(arms["beside"])
    assert beside.scaling == beside.shared_scaling == pytest.approx(1.5)
    assert beside.shared_rank * 3 * 32 * 2 * 4096 == pytest.approx(0.4 * wanted, rel=0.03)
    plus = arms["lora-plus"]
    assert plus.train["rates"].up == 16 and plus.train["weight_decay"] == 0.1
    assert plus.train["optimizer"] == "adamw_8bit"
    assert config_of(plus).num_up == 1 and plus.adapter.alpha == pytest.approx(2.0 * plus.adapter.rank)
    assert config_of(arms["cores"]).num_cores == 2 and arms["cores"].adapter.dropout == 0.1
    assert arms["fixed"].adapter.rank == 3 and "fewer parameters" in arms["fixed"].notes[0]
    assert COARSE > LIMIT


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", "names no arm"),
        ("few: 3", "few: 3 will not do: write {method"),
        ("a b: {}", "a b will not do: an arm's name"),
        ("few: {method: d2mroa}", "few: adapter.method: unknown method 'd2mroa'; did you mean 'd2mora'"),
        ("few: {alpha: 3}", "few.alpha: not of an arm; scale"),
        ("few: {start: run}", "few.start: not of an arm"),
        ("few: {scale: 0}", "few.scale: 0 will not do: a number above 0"),
        ("few: {shared: {part: 1.5}}", "few.shared.part: 1.5 will not do: a number above 0 and below 1"),
        ("few: {shared: {part: 0.5, rank: 2}}", "few.shared: give its rank or its part"),
        ("few: {train: {steps: 3}}", "few.train: 'steps' is the same for all arms"),
        ("few: {train: {rates: {upp: 3}}}", "few.train: unknown key"),
        ("few: {ranks: [1, 2], method: loramoe}", "few has a rank for each expert"),
    ],
)
def test_what_an_arm_cannot_be_is_one_line(
    text: str,
    words: str,
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "arms.yaml").write_text(text, encoding="utf-8")
    asked = ("train.steps=2", "--arms", tmp_path / "arms.yaml", "--out", tmp_path / "out", "--choose-rows", "4")
    assert run_cli(monkeypatch, "compare", made / "recipe.yaml", *asked) == 2
    err = capsys.readouterr().err
    assert words in err and err.startswith("error: ") and err.count("\n") == 1
    assert not (tmp_path / "out").exists()
