"""TWO, KILL0: of two writers one wins and nothing is mixed; a kill at any call of a beginning blocks nothing."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qd2mora.comparison.comparison_folder import ComparisonFolder, found_once
from qd2mora.disk.durable import write_json
from qd2mora.disk.lock import locked
from qd2mora.disk.sealed import seal_text, seal_whole_folder, unseal_text, verify_folder
from qd2mora.disk.staged import staged_folder
from qd2mora.errors import DamagedFile, InputRefused
from qd2mora.evaluation.answer_file import AnswerFile
from qd2mora.evaluation.score import Record
from qd2mora.redact import redacted, secret_in
from qd2mora.safekeeping.places import taken

PAIRS = int(os.environ.get("GATE_PAIRS", "20"))
CALLS = ("open", "write", "fsync", "replace", "rename", "mkdir", "unlink", "close", "ftruncate", "pwrite")


def forked(act: Callable[[], object]) -> int:
    """Start a child; its exit code is 0, or 2 where the act was refused."""
    child = os.fork()
    if child:
        return child
    try:
        act()
        os._exit(0)
    except InputRefused:
        os._exit(2)
    except BaseException:
        os._exit(1)


def code_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def make(out: Path, name: str) -> None:
    with taken(out, "--out") as target, staged_folder(target) as stage:
        for part in ("a", "b"):
            (stage / part).write_text(name)
            time.sleep(0.002)
        seal_whole_folder(stage, {}, {"kind": name})


def test_of_two_that_make_one_folder_one_is_refused_and_the_other_is_whole(tmp_path: Path) -> None:
    for number in range(PAIRS):
        out = tmp_path / f"out{number}"
        children = [forked(lambda name=name, out=out: make(out, name)) for name in ("x", "y")]
        assert sorted(code_of(child) for child in children) == [0, 2]
        verify_folder(out)
        assert (out / "a").read_text() == (out / "b").read_text()
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_what_appeared_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputRefused, match="meanwhile"), staged_folder(out):
        out.mkdir()
        (out / "thesis.tex").write_text("years of work")
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]


def killed_at(number: int, act: Callable[[], object]) -> bool:
    """Run the act in a child that is gone at its `number`-th call that changes a disk; tell whether it got there."""

    def child() -> None:
        left = [number]

        def counted(call: Callable[..., object]) -> Callable[..., object]:
            def wrapper(*arguments: object, **keywords: object) -> object:
                left[0] -= 1
                if left[0] < 0:
                    os._exit(9)
                return call(*arguments, **keywords)

            return wrapper

        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))
        act()

    return code_of(forked(child)) == 9


def begin_comparison(folder: Path) -> None:
    with locked(folder / "LOCK", "--out"):
        ComparisonFolder(folder).check(overwrite=False)
        ComparisonFolder(folder).begin({"recipe": 1}, overwrite=False)


BEGINNINGS: dict[str, Callable[[Path], object]] = {
    "eval": lambda place: AnswerFile(place / "s.rows.jsonl", {"model": "x"}).add("t", []),
    "compare": begin_comparison,
    "merge": lambda place: (place / "out").exists() or make(place / "out", "x"),
}


@pytest.mark.parametrize("verb", BEGINNINGS)
def test_a_kill_at_any_call_of_a_beginning_does_not_block_the_same_command(verb: str, tmp_path: Path) -> None:
    number, was_killed = 0, True
    while was_killed:
        place = tmp_path / str(number)
        place.mkdir()
        was_killed = killed_at(number, lambda place=place: BEGINNINGS[verb](place))
        BEGINNINGS[verb](place)
        number += 1
    assert number > 5


@pytest.mark.parametrize("left", [b"", b"\0\0\0", b'{"asked": {"mo'])
def test_a_beginning_that_an_earlier_version_left_half_is_begun_again(left: bytes, tmp_path: Path) -> None:
    path = tmp_path / "s.rows.jsonl"
    path.write_bytes(left)
    assert AnswerFile(path, {"model": "x"}).records == {}
    assert path.read_bytes().startswith(b'{"asked": {"model": "x"}')


def test_a_file_of_others_is_no_beginning(tmp_path: Path) -> None:
    path = tmp_path / "s.rows.jsonl"
    path.write_bytes(b"years of work")
    with pytest.raises(InputRefused, match="not a file of answers"):
        AnswerFile(path, {"model": "x"})
    assert path.read_bytes() == b"years of work"


def record(loss: float) -> Record:
    return Record(row=0, value=1.0, loss=loss, labels=1, text="yes")


def test_a_changed_digit_of_kept_answers_is_told_and_asked_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "s.rows.jsonl"
    AnswerFile(path, {"model": "x"}).add("t", [record(1.5), record(2.5), record(3.5)])
    whole = path.read_bytes()
    assert [each.loss for each in AnswerFile(path, {"model": "x"}).records["t"]] == [1.5, 2.5, 3.5]
    path.write_bytes(whole.replace(b"2.5", b"9.5"))
    assert [each.loss for each in AnswerFile(path, {"model": "x"}).records["t"]] == [1.5]
    assert "line 3" in caplog.text
    lines = whole.splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[2] + lines[1] + lines[3])  # in another order they are other answers
    assert AnswerFile(path, {"model": "x"}).records == {}
    path.write_bytes(whole.replace(b'"t"', b'"u"', 1))
    assert AnswerFile(path, {"model": "x"}).records == {}


def test_every_changed_bit_of_a_kept_result_is_found(tmp_path: Path) -> None:
    file = tmp_path / "results" / "seed-0.json"
    assert found_once(file, dict[str, float], lambda: {"loss": 1.25}) == {"loss": 1.25}
    whole = file.read_bytes()
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(DamagedFile):
            found_once(file, dict[str, float], lambda: {"loss": 9.0})


def test_a_lock_of_a_clock_that_was_ahead_ends_with_its_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qd2mora.disk.lock.TOUCH_S", 0.2)
    lock = tmp_path / "LOCK"
    lock.write_text('{"pid": 1, "host": "an earlier container", "started": "x"}')
    os.utime(lock, (time.time() + 86400,) * 2)
    with locked(lock):
        pass
    lock.write_text("my shopping list")
    with pytest.raises(InputRefused, match="no lock of ours"), locked(lock):
        pass
    assert lock.read_text() == "my shopping list"


@pytest.mark.parametrize("value", ["identity", "instruction", "adapter_model.safetensors", "short1"])
def test_a_word_of_our_own_files_is_no_secret(value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APP_TOKEN", value)
    assert redacted(f"a {value} b", named=False) == f"a {value} b" and secret_in(value) is None


def test_values_are_redacted_before_sealing_and_keys_never(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "canary-env-17-value"
    monkeypatch.setenv("APP_TOKEN", secret)
    write_json(tmp_path / "x.json", {secret: [f"it is {secret}", {"deep": (secret,)}]})
    assert (tmp_path / "x.json").read_text().count(secret) == 1
    sealed = seal_text({"identity": {"a": 1}, "sha": secret})
    assert unseal_text(sealed.encode(), "x")["sha"] == secret  # compared later, bit by bit: it stays what it is
