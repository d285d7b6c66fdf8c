"""B1, S1: a checkpoint is what was written, or it is not used."""

import itertools
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from safetensors.torch import load_file, save_file

from qd2mora.disk.sealed import MANIFEST, seal_text, unseal_text
from qd2mora.disk.tensor_file import encoded
from qd2mora.errors import DamagedFile, NotFinite
from qd2mora.training import checkpoint
from qd2mora.training.progress import Progress, State

FLIPS = int(os.environ.get("GATE_FLIPS", "2000"))
CUTS = int(os.environ.get("GATE_CUTS", "300"))


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """Checkpoints of steps 3 and 4."""
    for step in (3, 4):
        small.save(tmp_path, step)
    return tmp_path


def read(folder: Path, inventories: Any = None) -> State:
    return checkpoint.read(folder, *(inventories or small.source_at(0).expected()))


def test_any_changed_bit_is_found(two: Path) -> None:
    """B1: flips over all files of a checkpoint, the manifest included."""
    newest, draw, inventories = two / "step-4", random.Random(0), small.source_at(0).expected()
    files = {path: path.read_bytes() for path in newest.iterdir()}
    assert len(files) == 3
    for _ in range(FLIPS):
        path = draw.choice(list(files))
        content = bytearray(files[path])
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        with pytest.raises(DamagedFile):
            read(newest, inventories)
        path.write_bytes(files[path])
    assert read(newest).progress.step == 4


def test_any_cut_or_grown_file_is_found(two: Path) -> None:
    newest, draw, inventories = two / "step-4", random.Random(1), small.source_at(0).expected()
    files = {path: path.read_bytes() for path in newest.iterdir()}
    for number in range(CUTS):
        path = draw.choice(list(files))
        content = files[path]
        path.write_bytes(content + b"\0" * (1 + number % 9) if number % 10 == 0 else content[: number % len(content)])
        with pytest.raises(DamagedFile):
            read(newest, inventories)
        path.write_bytes(content)


def test_a_changed_set_of_files_is_found_and_the_one_before_is_used(two: Path) -> None:
    def edits(newest: Path, older: Path) -> list[Callable[[], object]]:
        names = [checkpoint.ADAPTER, checkpoint.OPTIMIZER, MANIFEST]
        return [
            *((lambda name=name: (newest / name).unlink()) for name in names),
            *((lambda name=name: shutil.copy(older / name, newest / name)) for name in names),
            *((lambda name=name: (newest / name).rename(newest / f"{name}.old")) for name in names),
            *((lambda name=name: (newest / name).write_bytes(b"")) for name in names),
            *((lambda name=name: ((newest / name).unlink(), (newest / name).mkdir())) for name in names),
            *((lambda name=name: ((newest / name).unlink(), os.mkfifo(newest / name))) for name in names),
            *(
                (lambda name=name: ((newest / name).unlink(), (newest / name).symlink_to("/dev/zero")))
                for name in names
            ),
            *(  # the same content, but what it is tomorrow is decided elsewhere
                (lambda name=name: ((newest / name).unlink(), (newest / name).symlink_to(kept / "step-4" / name)))
                for name in names
            ),
            lambda: (newest / "notes.txt").write_text("mine"),
            lambda: (newest / "adapter.bin").write_bytes(b"\x80\x02."),
            lambda: shutil.copytree(older, newest / "inside"),
            lambda: (shutil.rmtree(newest), shutil.copytree(older, newest)),
        ]

    kept = shutil.copytree(two, two.with_name("kept"))
    for number in range(len(edits(two, two))):
        shutil.rmtree(two)
        shutil.copytree(kept, two)
        edits(two / "step-4", two / "step-3")[number]()
        step, problems = small.load(two)
        assert step == 3 and len(problems) == 1


def forge(folder: Path, change: Callable[[dict[str, torch.Tensor]], None], file: str, declared: bool) -> None:
    """Change a tensor file and seal the folder anew, as somebody would who knows the format."""
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)
    manifest = unseal_text((folder / MANIFEST).read_bytes(), "")
    content = (folder / file).read_bytes()
    import hashlib

    manifest["files"][file] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    if declared:
        named = {str(torch.float32): "F32", str(torch.float16): "F16"}
        manifest["inventory"][file] = {
            name: [named[str(each.dtype)], list(each.shape)] for name, each in tensors.items()
        }
    (folder / MANIFEST).write_text(seal_text(manifest))


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("file", [checkpoint.ADAPTER, checkpoint.OPTIMIZER])
def test_every_tensor_that_is_not_the_one_of_the_run_is_refused_even_with_a_good_seal(
    file: str, declared: bool, tmp_path: Path
) -> None:
    """S1: each tensor of the inventory gone, empty, transposed, renamed, of another dtype, or one too many."""
    small.save(tmp_path, 3)
    small.save(tmp_path, 4)
    changes: list[Callable[[dict[str, torch.Tensor], str], Any]] = [
        lambda tensors, name: tensors.pop(name),
        lambda tensors, name: tensors.update({name: torch.zeros(0)}),
        lambda tensors, name: tensors.update({name: tensors[name].unsqueeze(0)}),
        lambda tensors, name: tensors.update({f"{name}x": tensors.pop(name)}),
        lambda tensors, name: tensors.update({name: tensors[name].half()}),
        lambda tensors, name: tensors.update({f"{name}::more": tensors[name].clone()}),
    ]
    kept = (tmp_path / "step-4").rename(tmp_path / "kept")
    for name, change in itertools.product(load_file(kept / file), changes):
        shutil.rmtree(tmp_path / "step-4", ignore_errors=True)
        shutil.copytree(kept, tmp_path / "step-4")
        forge(tmp_path / "step-4", lambda tensors, c=change, n=name: c(tensors, n), file, declared)
        with pytest.raises(DamagedFile):
            read(tmp_path / "step-4")
        assert small.load(tmp_path)[0] == 3


def test_moments_go_back_to_their_parameter_by_name_whatever_the_order() -> None:
    saved, other = small.source_at(1), small.source_at(2)
    turned = type(other)(dict(reversed(other.parameters.items())), other.optimizer)
    turned.optimizer.param_groups[0]["params"].reverse()
    adapter, moments, scalars = saved.collect(copied=True)
    turned.restore(State(adapter, moments, scalars, Progress(step=1, applied=1)))
    again = turned.collect(copied=True)
    assert again[1].keys() == moments.keys()
    assert all(torch.equal(again[1][name], moments[name]) for name in moments)


@pytest.mark.parametrize("is_trained", [True, False])
def test_asking_for_the_inventory_changes_nothing(is_trained: bool) -> None:
    source = small.source_at(1)
    if not is_trained:
        source.optimizer.state.clear()
    adapter, moments, scalars = source.collect(copied=True)
    source.expected()
    there = source.collect(copied=True)
    assert there[2] == scalars
    for before, after in ((adapter, there[0]), (moments, there[1])):
        assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)


@pytest.mark.parametrize("where", ["adapter", "moments"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_never_saved(where: str, value: float, tmp_path: Path) -> None:
    small.save(tmp_path, 3)
    for name in getattr(small.state_at(4), where):
        state = small.state_at(4)
        tensor = getattr(state, where)[name]
        if tensor.is_floating_point():
            tensor.view(-1)[-1] = value
            with pytest.raises(NotFinite, match=name):
                checkpoint.save(tmp_path, state, 2)
    assert checkpoint.steps_on_disk(tmp_path) == [3]


def test_the_stream_writes_what_the_library_reads(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(3, 5, dtype=torch.bfloat16),
        "u": torch.arange(7, dtype=torch.uint8),
        "f": torch.randn(2, 3).T,
        "scalar": torch.tensor(3.0, dtype=torch.float64),
        "empty": torch.zeros(0, 4),
        "i": torch.arange(5),
        "yes": torch.tensor([True, False]),
        "h": torch.randn(1).half(),
    }
    (tmp_path / "file").write_bytes(b"".join(bytes(chunk) for chunk in encoded(tensors)))
    there = load_file(tmp_path / "file")
    assert there.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert there[name].dtype == tensor.dtype and torch.equal(there[name], tensor)


def test_keeping_counts_whole_checkpoints_only(two: Path) -> None:
    (two / "step-4" / MANIFEST).write_text("{}")
    step, problems = small.load(two)
    assert (step, len(problems)) == (3, 1)
    checkpoint.set_aside_after(two, step)
    small.save(two, 4)
    assert checkpoint.steps_on_disk(two) == [3, 4]
    assert small.load(two) == (4, [])


def test_names_of_steps_are_read_strictly(two: Path) -> None:
    for name in ("step-04", "step-+5", "step-5x", "step-", "step-٥"):  # noqa: RUF001 - the last is a digit too
        (two / name).mkdir()
    assert checkpoint.steps_on_disk(two) == [3, 4]


def test_deep_or_hostile_manifests_are_damage_and_nothing_else(two: Path) -> None:
    for text in ("[" * 100_000, "null", "3", '"x"', "{}", json.dumps({"files": 3, "sha256": ""}), "\ufeff{}"):
        (two / "step-4" / MANIFEST).write_text(text)
        with pytest.raises(DamagedFile):
            read(two / "step-4")
    for content in ({"files": {}}, {"files": {"../x": {}}}, {"files": []}, {}):
        (two / "step-4" / MANIFEST).write_text(seal_text(content))
        with pytest.raises(DamagedFile):
            read(two / "step-4")
