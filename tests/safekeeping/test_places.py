"""OUT: no verb writes into what is sealed, a run's own, a comparison's or a model's, nor over another kind of file."""

from collections.abc import Callable
from pathlib import Path

import pytest
from trees import content, copied

from qd2mora.composition import compose
from qd2mora.disk.sealed import seal_text
from qd2mora.errors import InputRefused
from qd2mora.evaluation import EvalOptions, evaluate
from qd2mora.merging import ExportOptions, merge, merge_tasks
from qd2mora.report import check_page, check_png
from qd2mora.run_folder import RunFolder
from qd2mora.safekeeping.places import check_place, taken
from qd2mora.safekeeping.verification import verified
from qd2mora.training.opening import check_folder

FOLDERS: dict[str, Callable[[Path, Path], object]] = {
    "train": lambda made, out: check_folder(RunFolder(out), resume=False, overwrite=True),
    "merge": lambda made, out: merge(made / "run", out, ExportOptions(strategy="mean_gate")),
    "merge --task all": lambda made, out: merge_tasks(made / "run", out, ExportOptions(strategy="mean_gate")),
    "compose": lambda made, out: compose("cat", [str(made / "lora")], out),
}
FILES: dict[str, Callable[[Path, Path], object]] = {
    "eval": lambda made, out: evaluate(made / "run", how=EvalOptions(out=out)),
    "inspect --html": lambda made, out: check_page(out),
    "png": lambda made, out: check_png(out.with_suffix(".png")),
}
INSIDE = (
    *("run/adapter/x", "run/checkpoints/x", "run/checkpoints/step-4/x", "run/best/x", "run/export/x", "run/adapter"),
    *("hf/x", "lora/x/y", "base/x", "plan/runs/x", "plan/split"),
)
OVER = ("run/recipe.yaml", "run/manifest.json", "run/metrics.jsonl", "run/tokenizer.json", "data/first.jsonl")


@pytest.fixture
def world(made: Path, tmp_path: Path) -> Path:
    folder = copied(made, tmp_path / "world")
    (folder / "plan/runs").mkdir(parents=True)
    (folder / "plan/plan.json").write_text(seal_text({"recipe": 1}))
    return folder


@pytest.mark.parametrize("verb", [*FOLDERS, *FILES])
def test_no_verb_writes_into_what_is_not_to_be_changed(verb: str, world: Path) -> None:
    before = content(world)
    for place in INSIDE:
        if verb in FILES:
            place = f"{place}/s.json"
        with pytest.raises(InputRefused):
            (FOLDERS | FILES)[verb](world, world / place)
        assert content(world) == before, place


@pytest.mark.parametrize("verb", FILES)
def test_no_verb_writes_over_a_file_of_another_kind(verb: str, world: Path) -> None:
    places: tuple[str, ...] = (*OVER, "run", "base", "recipe.yaml")
    if verb == "png":
        places = ("data/photo.png",)
        (world / places[0]).write_bytes(b"years of work")
    before = content(world)
    for place in places:
        with pytest.raises(InputRefused):
            FILES[verb](world, world / place)
        assert content(world) == before, place


def test_a_link_into_a_sealed_folder_and_a_home_that_is_not_expanded_are_refused(world: Path) -> None:
    (world / "link").symlink_to(world / "run/adapter")
    (world / "nowhere").symlink_to(world / "gone")
    for place in (world / "link/m", world / "nowhere", Path("~/m"), Path("~")):
        with pytest.raises(InputRefused):
            check_place(place, "--out")


def test_what_a_verb_adds_to_a_run_is_listed_in_it(world: Path) -> None:
    run = world / "run"
    scores = evaluate(run, how=EvalOptions(out=run / "mine.json"))
    assert scores and [each.folder for each in verified(run)] == [run]
    merge(run, run / "merged", ExportOptions(strategy="mean_gate"))
    (found,) = verified(run)
    assert not found.said
    (run / "merged/config.json").write_text("{}")
    with pytest.raises(Exception, match=r"merged/config\.json"):
        list(verified(run))


def test_an_empty_folder_may_be_taken_and_a_full_one_may_not(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with taken(tmp_path / "empty", "--out") as place:
        assert place == tmp_path / "empty"
    (tmp_path / "empty/x").touch()
    with pytest.raises(InputRefused, match="not empty"), taken(tmp_path / "empty", "--out"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"]
