"""VER: every file of a finished run, changed, gone, replaced or added, is found within seconds; exports before use."""

import os
import random
import time
from pathlib import Path

import pytest
from trees import copied, flipped, put

from qd2mora.disk.sealed import verify_folder
from qd2mora.errors import DamagedFile
from qd2mora.evaluation.subject import open_subject
from qd2mora.run_folder import open_run
from qd2mora.safekeeping.verification import verified

# One flip is found by reading each file once; what would not end is what this excludes.
LIMIT_S = 60.0
FLIPS = int(os.environ.get("GATE_EXPORT_FLIPS", "12"))


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def damaged(run: Path, name: str, how: str) -> None:
    path = run / name
    if how == "flip":
        flipped(path, 40)
    elif how == "delete":
        path.unlink()
    elif how == "link":
        path.rename(run.parent / "elsewhere")
        path.symlink_to(run.parent / "elsewhere")
    elif how == "pipe":
        path.unlink()
        os.mkfifo(path)
    else:
        put("file", path.with_name("added"))


@pytest.mark.parametrize("how", ["flip", "delete", "link", "pipe", "added"])
def test_whatever_happens_to_a_file_of_a_run_is_found_in_time(how: str, made: Path, tmp_path: Path) -> None:
    assert [each.said for each in verified(made / "run")] == [()]
    for name in files_of(made / "run"):
        if name == "LOCK":
            continue
        run = copied(made / "run", tmp_path / "run")
        damaged(run, name, how)
        began = time.monotonic()
        with pytest.raises(DamagedFile):
            list(verified(run))
        assert time.monotonic() - began < LIMIT_S, name


@pytest.mark.parametrize("folder", ["adapter", "best", "checkpoints", "checkpoints/step-4", "export"])
def test_a_folder_of_a_run_that_is_gone_or_a_link_is_found(folder: str, made: Path, tmp_path: Path) -> None:
    if not (made / "run" / folder).is_dir():
        pytest.skip("this run keeps none")
    run = copied(made / "run", tmp_path / "run")
    (run / folder).rename(tmp_path / "moved")
    with pytest.raises(DamagedFile):
        list(verified(run))
    (run / folder).symlink_to(tmp_path / "moved")
    with pytest.raises(DamagedFile):
        list(verified(run))


def test_weights_changed_beside_an_empty_recipe_are_found(made: Path, tmp_path: Path) -> None:
    run = copied(made / "run", tmp_path / "run")
    (run / "adapter/recipe.yaml").touch()
    flipped(run / "adapter/adapter_model.safetensors", -7)
    with pytest.raises(DamagedFile):
        list(verified(run))


@pytest.mark.parametrize("kind", ["hf", "lora"])
def test_a_changed_export_is_never_answered_from(kind: str, made: Path, tmp_path: Path) -> None:
    draw = random.Random(0)
    names = files_of(made / kind)
    for number in range(FLIPS):
        export = copied(made / kind, tmp_path / "export")
        path = export / names[number % len(names)]
        flipped(path, draw.randrange(path.stat().st_size))
        with pytest.raises(DamagedFile):
            open_subject(export)


def test_a_folder_of_others_loads_whatever_its_manifest_says(made: Path, tmp_path: Path) -> None:
    export = copied(made / "hf", tmp_path / "theirs")
    (export / "manifest.json").write_text('{"name": "a web app"}')
    assert open_subject(export).model is not None
    (export / "manifest.json").unlink()
    assert open_subject(export).model is not None


def test_a_changed_tokenizer_of_a_run_is_found_before_it_is_used(made: Path, tmp_path: Path) -> None:
    run = copied(made / "run", tmp_path / "run")
    flipped(run / "tokenizer.json", 40)
    with pytest.raises(DamagedFile, match=r"tokenizer\.json"):
        open_run(run)


def test_a_pipe_in_a_sealed_folder_does_not_make_verify_wait(made: Path, tmp_path: Path) -> None:
    export = copied(made / "hf", tmp_path / "hf")
    (export / "model.safetensors").unlink()
    os.mkfifo(export / "model.safetensors")
    with pytest.raises(DamagedFile, match="not an ordinary file"):
        verify_folder(export)
