"""PW1: whatever a power cut leaves of a save, the newest checkpoint loads and no published one is broken."""

import copy
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import power_cut
import pytest
import small
from power_cut import Call

from qd2mora.disk.durable import write_file, write_json
from qd2mora.disk.sealed import seal_folder, verify_folder
from qd2mora.disk.staged import staged_folder
from qd2mora.errors import DamagedFile
from qd2mora.training import checkpoint

MOST = int(os.environ.get("GATE_CRASHES", "24"))
"""States that are tried after each call."""
INVENTORIES = small.source_at(0).expected()


def first_broken(
    before: power_cut.Folder,
    calls: list[Call],
    holds: Callable[[Path, bool], bool],
    place: Path,
) -> tuple[int, int | None]:
    """Cut the power after each call; return the number of states, and after which call one does not hold."""
    disk, draw, seen = power_cut.Disk(copy.deepcopy(before)), random.Random(0), set()
    for number in range(len(calls) + 1):
        if number:
            disk.apply(calls[number - 1])
        for state in disk.crashes(MOST, draw):
            key = (number == len(calls), hash(tuple(sorted(state.items(), key=lambda item: item[0]))))
            if key in seen:
                continue
            seen.add(key)
            shutil.rmtree(place, ignore_errors=True)
            power_cut.put(state, place)
            if not holds(place, number == len(calls)):
                return len(seen), number
    return len(seen), None


def checkpoints_hold(folder: Path, is_saved: bool) -> bool:
    """Step 5 was being saved beside 3 and 4: no step but a whole one, and 5 once the call has returned."""
    try:
        for step in checkpoint.steps_on_disk(folder):
            verify_folder(folder / f"step-{step}")
        state, problems = checkpoint.newest(folder, *INVENTORIES)
    except DamagedFile:
        return False
    return not problems and state is not None and state.progress.step in ((5,) if is_saved else (4, 5))


def text_holds(folder: Path, is_saved: bool) -> bool:
    try:
        return json.loads((folder / "manifest.json").read_text()) in ([2 * "new"],) + (() if is_saved else (["old"],))
    except (ValueError, OSError):
        return False


def adapter_holds(folder: Path, is_saved: bool) -> bool:
    """A folder that a library fills takes the place of another; between two renames only the old one is there."""
    try:
        olds = list(folder.glob(".adapter.*.old"))
        verify_folder(folder / "adapter" if (folder / "adapter").exists() else olds[0])
        return not is_saved or (folder / "adapter" / "weights").read_bytes() == b"new" * 99
    except (DamagedFile, OSError, IndexError):
        return False


def fill(folder: Path, content: bytes) -> None:
    with staged_folder(folder / "adapter", ()) as stage:
        (stage / "weights").write_bytes(content)  # as a library does: nothing forced to disk
        import hashlib

        seal_folder(stage, {"weights": (len(content), hashlib.sha256(content).hexdigest())}, {})


def prepare(folder: Path) -> None:
    folder.mkdir()
    for step in (3, 4):
        small.save(folder, step)
    write_json(folder / "manifest.json", ["old"])
    fill(folder, b"old" * 99)


SAVES: dict[str, tuple[Callable[[Path], object], Callable[[Path, bool], bool]]] = {
    "a checkpoint": (lambda folder: small.save(folder, 5, keep=9), checkpoints_hold),
    "a checkpoint, an older one goes": (lambda folder: small.save(folder, 5, keep=2), checkpoints_hold),
    "a text": (lambda folder: write_json(folder / "manifest.json", [2 * "new"]), text_holds),
    "an adapter": (lambda folder: fill(folder, b"new" * 99), adapter_holds),
}


@pytest.mark.parametrize("name", SAVES)
def test_every_state_that_a_power_cut_may_leave_is_the_old_one_or_the_new_one(name: str, tmp_path: Path) -> None:
    save, holds = SAVES[name]
    prepare(tmp_path / "run")
    before = power_cut.read_tree(tmp_path / "run")
    with power_cut.recorded(tmp_path / "run") as calls:
        save(tmp_path / "run")
    states, broken = first_broken(before, calls, holds, tmp_path / "state")
    print(f"PW1 {name}: calls={len(calls)} states={states}")
    assert broken is None, calls[:broken][-1:]
    assert states > len(calls)
    for paths in syncs(calls):
        weaker = [call for number, call in enumerate(calls) if number not in paths]
        if name == "a checkpoint, an older one goes" and is_first_of_two(calls, paths):
            continue  # the sync before the removal stands for it
        assert first_broken(before, weaker, holds, tmp_path / "state")[1] is not None, (
            f"{calls[paths[0]]} is not needed"
        )


def syncs(calls: list[Call]) -> list[list[int]]:
    """Return the syncs that stand for one thing each: all of a file or a stage, each of the folder they are in."""
    found: dict[object, list[int]] = {}
    for number, (kind, path, _) in enumerate(calls):
        if kind == "fsync":
            found.setdefault(path or number, []).append(number)
    return list(found.values())


def is_first_of_two(calls: list[Call], numbers: list[int]) -> bool:
    parents = [number for number, (kind, path, _) in enumerate(calls) if kind == "fsync" and not path]
    return len(parents) == 2 and numbers == parents[:1]


def test_the_model_loses_what_was_not_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recorder sees plain calls; a file that was synced in a folder that was not may have no name."""
    monkeypatch.setattr(power_cut, "TEARS", 2)
    (tmp_path / "run").mkdir()
    before = power_cut.read_tree(tmp_path / "run")
    with power_cut.recorded(tmp_path / "run") as calls:
        write_file(tmp_path / "run" / "x", [b"ab", b"cd"])
    assert [call[0] for call in calls] == ["create", "write", "write", "fsync"]
    disk = power_cut.Disk(before)
    for call in calls[:3]:
        disk.apply(call)
    found = [state.get("x") for state in disk.crashes(99, random.Random(0))]
    assert {None, b"", b"ab", b"abcd", b"\0\0cd", b"ab\0\0", b"\0\0\0\0"} == set(found)
    disk.apply(calls[3])
    assert {state.get("x") for state in disk.crashes(99, random.Random(0))} == {None, b"abcd"}
