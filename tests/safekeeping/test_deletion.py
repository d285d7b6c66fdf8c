"""DEL: only what is ours is removed or replaced; whatever else lies in a folder makes `--overwrite` refuse by name."""

import itertools
import json
import os
from pathlib import Path

import pytest
from trees import FOREIGN, content, copied, put

from qd2mora.comparison.comparison_folder import ComparisonFolder, found_once
from qd2mora.disk.owned import foreign_in
from qd2mora.disk.passing import passing_name, remove_left_behind
from qd2mora.disk.sealed import seal_text, seal_whole_folder
from qd2mora.disk.staged import remove_folder, staged_folder
from qd2mora.errors import InputRefused
from qd2mora.run_folder import RunFolder
from qd2mora.safekeeping.inventory import foreign_in_run
from qd2mora.training.opening import check_folder

LAYOUTS = int(os.environ.get("GATE_LAYOUTS", "40"))
PLACES = ("", "adapter", "best", "checkpoints", "checkpoints/step-4", "export")
NAMES = ("thesis.tex", "notes.md", "recipe.yml", ".hidden", "step-x", "model.bin", "plan.json", ".run.partial", "a.old")
KINDS = ("file", "folder", "link", "pipe")


def layouts() -> list[tuple[str, str, str]]:
    every = list(itertools.product(PLACES, NAMES, KINDS))
    step = max(1, len(every) // LAYOUTS)
    return every[::step]


def test_a_run_with_anything_else_in_it_is_not_replaced_and_nothing_is_lost(made: Path, tmp_path: Path) -> None:
    run = copied(made / "run", tmp_path / "run")
    assert foreign_in_run(run) is None
    check_folder(RunFolder(run), resume=False, overwrite=True)
    for place, name, kind in layouts():
        put(kind, run / place / name)
        before = content(run)
        for overwrite in (False, True):
            with pytest.raises(InputRefused, match="not written by it") as refused:
                check_folder(RunFolder(run), resume=False, overwrite=overwrite)
            assert name in str(refused.value) and "--overwrite" not in str(refused.value)
        assert content(run) == before
        if kind == "folder":
            (run / place / name / "thesis.tex").unlink()
            (run / place / name).rmdir()
        else:
            (run / place / name).unlink()


@pytest.mark.parametrize("name", ["recipe.yaml", "manifest.json", "plan.json", "thesis.tex", "adapter", "checkpoints"])
def test_a_folder_is_no_run_by_one_generic_name(name: str, tmp_path: Path) -> None:
    out = tmp_path / "project"
    out.mkdir()
    put("folder" if "." not in name else "file", out / name)
    before = content(out)
    for overwrite in (False, True):
        with pytest.raises(InputRefused) as refused:
            check_folder(RunFolder(out), resume=False, overwrite=overwrite)
        assert "--overwrite" not in str(refused.value)
    assert content(out) == before


def test_a_recipe_that_was_edited_in_its_run_is_not_replaced(made: Path, tmp_path: Path) -> None:
    run = copied(made / "run", tmp_path / "run")
    (run / "recipe.yaml").write_text((run / "recipe.yaml").read_text() + "# what I learned\n")
    with pytest.raises(InputRefused, match=r"recipe\.yaml"):
        check_folder(RunFolder(run), resume=False, overwrite=True)


def test_a_comparison_is_told_by_its_sealed_plan_and_by_nothing_else(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "plan.json").write_text("{}")
    (theirs / "thesis.tex").write_bytes(FOREIGN)
    with pytest.raises(InputRefused, match="no plan that a comparison wrote"):
        ComparisonFolder(theirs).begin({"recipe": 1}, overwrite=True)
    assert (theirs / "thesis.tex").read_bytes() == FOREIGN
    ours = ComparisonFolder(tmp_path / "ours")
    ours.path.mkdir()
    assert ours.begin({"recipe": 1}, overwrite=False)
    found_once(ours.result("lora", "seed-0"), dict[str, int], lambda: {"a": 1})
    for place in ("thesis.tex", "results/lora/mine.json", "runs/lora"):
        (ours.path / place).parent.mkdir(parents=True, exist_ok=True)
        put("folder" if place.endswith("lora") else "file", ours.path / place)
        with pytest.raises(InputRefused, match="not replaced"):
            ours.begin({"recipe": 2}, overwrite=True)
        if place.endswith("lora"):
            break
        (ours.path / place).unlink()
    (ours.path / "runs/lora/thesis.tex").unlink()
    assert ours.begin({"recipe": 2}, overwrite=True)
    assert sorted(path.name for path in ours.path.iterdir()) == ["plan.json"]


def test_a_sealed_folder_goes_only_without_what_somebody_added(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "weights").write_bytes(b"w")
    seal_whole_folder(folder, {}, {"kind": "export"})
    put("file", folder / "notes.md")
    assert foreign_in(folder) == folder / "notes.md"
    with pytest.raises(InputRefused, match=r"notes\.md"):
        remove_folder(folder)
    with pytest.raises(InputRefused, match=r"notes\.md"), staged_folder(folder, ()):
        pass
    assert (folder / "notes.md").read_bytes() == FOREIGN
    (folder / "notes.md").unlink()
    remove_folder(folder)
    assert not list(tmp_path.iterdir())


def test_of_passing_names_only_those_of_processes_that_are_gone_are_removed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name in (".out.partial", ".out.old", ".out.12.partial", f".out.{os.getppid()}-00000000.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").write_bytes(FOREIGN)
    gone = tmp_path / f".out.{2**22 + 7}-00000000.partial"  # no system gives such a number
    gone.mkdir()
    mine = passing_name(out)
    mine.mkdir()
    remove_left_behind(out)
    assert not gone.exists() and mine.exists()
    assert len(list(tmp_path.glob(".out*/thesis.tex"))) == 4


def test_a_manifest_that_was_changed_tells_nothing_of_what_may_go(made: Path, tmp_path: Path) -> None:
    run = copied(made / "run", tmp_path / "run")
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["inventory"]["files"]["thesis.tex"] = None
    del manifest["sha256"]
    (run / "thesis.tex").write_bytes(FOREIGN)
    (run / "manifest.json").write_text(seal_text(manifest).replace("thesis", "Thesis"))
    with pytest.raises(InputRefused, match="cannot be told"):
        check_folder(RunFolder(run), resume=False, overwrite=True)
