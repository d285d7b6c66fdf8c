"""Tuning: one budget for every arm, settings that cover what is swept, and the better half of them trained longer."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from qd2mora.comparison import ComparisonSettings, trials
from qd2mora.comparison.arms_file import Wish
from qd2mora.comparison.matched_arms import Arm, matched_arms
from qd2mora.comparison.running import compare
from qd2mora.comparison.trials import num_settings, recipe_of, space_of
from qd2mora.comparison.tuning import Setting, candidates, checked_space, rungs_of, trainings_worth, tuned
from qd2mora.errors import InputRefused, NotFinite
from qd2mora.recipe import Adapter, Recipe, load_recipe
from qd2mora.recipe.train import Rates

SPACE = {"rate": (1e-3, 3e-3, 1e-2), "up": (1.0, 4.0, 16.0), "router": (1.0, 4.0), "alpha": (1.0, 0.5, 2.0)}


def settings_of(made: Path, *changes: str) -> Recipe:
    return load_recipe(made / "recipe.yaml", ["train.steps=4", *changes])


def test_settings_are_different_the_same_every_time_and_cover_every_value() -> None:
    found = candidates(SPACE, 12)
    assert found == candidates(SPACE, 12) and len(set(found)) == 12
    assert found[0] == Setting(1e-3, up=1.0, router=1.0, alpha=1.0)
    for key, values in SPACE.items():
        assert {getattr(each, key) for each in found} == set(values)
    assert len(candidates(SPACE, None)) == len(candidates(SPACE, 1000)) == 54
    assert len({each.name for each in candidates(SPACE, None)}) == 54


def test_halving_finds_the_best_within_its_budget_and_every_round_is_twice_as_long() -> None:
    taken: list[tuple[Setting, int | None]] = []

    def losses(setting: Setting, steps: int | None) -> float:
        taken.append((setting, steps))
        if setting.up == 4.0:
            return math.inf  # diverged
        # After few steps a large rate looks better than it is.
        return abs(math.log(setting.rate / 3e-3)) - (setting.rate * 20 if steps == 25 else 0) + setting.alpha

    found = tuned(SPACE, 12, 100, losses)
    assert rungs_of(12, 100, True) == [(12, 25), (6, 50), (3, 100)]
    assert [len(rung.losses) for rung in found.rungs] == [12, 6, 3]
    assert sum(steps or 0 for _, steps in taken) == 900 == 100 * trainings_worth(12, True)
    finite = [each for each in candidates(SPACE, 12) if each.up != 4.0]
    assert found.setting.rate == 3e-3 and found.setting.up != 4.0
    assert found.losses.keys() == {each.name for each in candidates(SPACE, 12)} and len(finite) < 12
    assert "rate" not in found.edges
    with pytest.raises(InputRefused, match="no setting that was tried gave a finite loss"):
        tuned(SPACE, 4, 100, lambda setting, steps: math.inf)


def test_without_a_number_of_tries_every_setting_is_trained_at_full_length() -> None:
    assert rungs_of(3, 50, False) == [(3, 50)] and rungs_of(1, 50, True) == []
    assert trainings_worth(3, False) == 3 and trainings_worth(1, False) == 0


def test_a_setting_is_what_its_run_is_trained_with(made: Path, tmp_path: Path) -> None:
    recipe = settings_of(made, "train.warmup_steps=100")
    adapter = Adapter(method="lora", rank=4, alpha=8.0, shared={"rank": 2})  # type: ignore[arg-type]
    arm = Arm("plus", adapter, 0, {"rates": Rates(up=2.0), "weight_decay": 0.5})
    setting = Setting(1e-2, up=4.0, router=3.0, alpha=0.5, dropout=0.1)
    made_of = recipe_of(recipe, trials.Training(arm, 7, setting, 40, tmp_path / "run"))
    assert made_of.train.learning_rate == 1e-2 and made_of.train.seed == 7 and made_of.train.steps == 40
    assert made_of.train.rates == Rates(up=8.0, router=3.0) and made_of.train.weight_decay == 0.5
    assert made_of.train.warmup_steps == 4
    assert made_of.adapter.alpha == 4.0 and made_of.adapter.dropout == 0.1
    assert made_of.adapter.shared is not None and made_of.adapter.shared.alpha == 2.0  # twice its rank, halved
    assert load_recipe_of(made_of, tmp_path) == made_of


def load_recipe_of(recipe: Recipe, folder: Path) -> Recipe:
    (folder / "again.yaml").write_text(recipe.dump_yaml(), encoding="utf-8")
    return load_recipe(folder / "again.yaml")


def test_arms_are_asked_for_rates_of_what_they_have_and_all_have_one_budget(made: Path) -> None:
    recipe = settings_of(made)
    space = SPACE | {"core": (1.0, 2.0), "down": (1.0, 2.0)}
    asked = ComparisonSettings(("d2mora", "lora", "flylora", "residual_cores"), space=space, tries=8)
    arms = {arm.name: arm for arm in matched_arms(recipe, list(asked.methods))}
    has = {name: {"core", "down", "router"} & set(space_of(asked, arm, recipe)) for name, arm in arms.items()}
    assert has == {
        "d2mora": {"down", "router"},
        "lora": {"down"},
        "flylora": set(),  # its down expert is frozen, and ranks choose themselves
        "residual_cores": {"core", "down", "router"},
    }
    assert {num_settings(asked, arm, recipe) for arm in arms.values()} == {(8, True)}


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({"upp": [1]}, "'upp' is not swept; did you mean 'up'"),
        ({"up": ["fast"]}, r"--space.up: \['fast'\] will not do"),
        ({"up": [0]}, "numbers above 0"),
        ({"dropout": [1.0]}, "--space.dropout"),
        ({"alpha": []}, "--space.alpha"),
    ],
)
def test_what_cannot_be_swept_is_refused(space: dict[str, object], words: str) -> None:
    with pytest.raises(InputRefused, match=words):
        checked_space(space, "--space")
    assert checked_space({"dropout": [0, 0.1], "up": 2}, "--space") == {"dropout": (0.0, 0.1), "up": (2.0,)}


@pytest.mark.long
def test_a_tuned_comparison_that_was_killed_goes_on_and_ends_the_same_with_equal_time_beside(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = settings_of(made)
    wishes = {"cores": Wish("residual_cores", {"targets": ["q_proj", "v_proj", "down_proj"]})}
    asked = ComparisonSettings(
        ("lora", "cores"), 1, rates=(3e-3, 1e-2), choose_rows=4, export=False, space={"up": (1.0, 4.0)}, tries=4
    )
    trained: list[str] = []
    once = trials.train

    def killed_in_the_second_round(recipe: Recipe, **options: bool):
        trained.append(f"{Path(recipe.output).name} {recipe.train.steps}")
        if len(trained) == 6:
            raise KeyboardInterrupt
        if recipe.train.learning_rate == 3e-3 and recipe.train.rates is not None:
            raise NotFinite("step 1: loss nan")
        return once(recipe, **options)

    monkeypatch.setattr(trials, "train", killed_in_the_second_round)
    with pytest.raises(KeyboardInterrupt):
        compare(recipe, asked, tmp_path / "out", wishes=wishes)
    before = list(trained)
    timed = replace(asked, equal_time=True)
    monkeypatch.setattr(trials, "seconds_a_step", lambda folder: 0.5 if "lora" in folder.parts else 1.0)
    found = compare(recipe, timed, tmp_path / "out", wishes=wishes)
    # Four settings for two steps, two of those for four, the best with a seed; what was done is not done again.
    assert [name.split()[1] for name in before[:6]] == ["2"] * 4 + ["4"] * 2
    assert len(trained) - 6 == 1 + 1 + 6 + 1 + 1
    written = json.loads((tmp_path / "out" / "compare.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(found.to_json()))
    lora = written["arms"][0]
    assert [rung["steps"] for rung in lora["rungs"]] == [2, 4] and lora["sweep"]["0.003-up4"] is None
    assert lora["setting"]["rate"] == lora["rate"]
    again = compare(recipe, timed, tmp_path / "out", wishes=wishes)
    assert again.to_json() == found.to_json()
    with pytest.raises(InputRefused, match=r"holds another arm 'cores' \(adapter changed\)"):
        compare(recipe, timed, tmp_path / "out", wishes={"cores": Wish("residual_cores", {"dropout": 0.1})})
