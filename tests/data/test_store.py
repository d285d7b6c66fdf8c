"""Tokens that are kept: found again, made anew when stale or damaged, and never whole in memory."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from qd2mora.data import Row, prepare
from qd2mora.errors import InputRefused
from qd2mora.recipe import Data, Task


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("qd2mora.data.token_store.SMALLEST_KEPT", 0)
    monkeypatch.setenv("QD2MORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


def save(folder: Path, number: int = 5000) -> Data:
    lines = [json.dumps({"prompt": f"red {n} ", "completion": "sun " * (n % 7 + 1), "v": [n]}) for n in range(number)]
    (folder / "rows.jsonl").write_text("\n".join(["{}", *lines]), encoding="utf-8")
    task = Task(name="t", path=str(folder / "rows.jsonl"), format="completion", validation=10, vector="v")
    return Data(tasks=[task], on_bad_row="skip")


def facts(row: Row) -> tuple[object, ...]:
    return row.task, row.ids.tolist(), row.masked, row.pair, row.earlier


def test_tokens_are_found_again_as_they_were_with_what_was_left_out(
    tokenizer: PreTrainedTokenizerBase, cache: Path, tmp_path: Path
) -> None:
    data = save(tmp_path)
    first = prepare(data, tokenizer, 0)[0]
    (kept,) = cache.iterdir()
    made = (kept / "rows.arrow").stat().st_mtime_ns
    # Length, masking, seed and what is held out are taken at reading: the same tokens serve.
    shorter = prepare(data.model_copy(update={"max_length": 10, "mask_prompt": False}), tokenizer, 1)[0]
    again = prepare(data, tokenizer, 0)[0]
    assert (kept / "rows.arrow").stat().st_mtime_ns == made and list(cache.iterdir()) == [kept]
    assert again.skipped == first.skipped and again.skipped.total == 1
    assert [facts(row) for row in again.train] == [facts(row) for row in first.train]
    assert all(row.pair.answer == "sun " * int((row.pair.vector or (0,))[0] % 7 + 1) for row in first.train)
    assert max(map(len, (row.ids for row in shorter.train))) == 10 and shorter.train[0].masked == 0


@pytest.mark.parametrize("change", ["row", "format", "limit"])
def test_what_changed_is_tokenised_anew(
    change: str, tokenizer: PreTrainedTokenizerBase, cache: Path, tmp_path: Path
) -> None:
    data = save(tmp_path, 50)
    prepare(data, tokenizer, 0)
    if change == "row":
        path = tmp_path / "rows.jsonl"
        path.write_text(path.read_text(encoding="utf-8").replace("red 7 ", "red 8 "), encoding="utf-8")
        assert prepare(data, tokenizer, 0)[0].skipped.places and len(list(cache.iterdir())) == 2
        return
    changes = {"limit": 20} if change == "limit" else {"fields": {"prompt": "completion"}}
    data = data.model_copy(update={"tasks": [data.tasks[0].model_copy(update=changes)]})
    assert prepare(data, tokenizer, 0) and len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("damage", ["bit", "cut", "gone", "manifest"])
def test_damaged_tokens_are_noticed_and_made_anew(
    damage: str, tokenizer: PreTrainedTokenizerBase, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = save(tmp_path, 200)
    wanted = [facts(row) for row in prepare(data, tokenizer, 0)[0].train]
    (kept,) = cache.iterdir()
    file = kept / ("manifest.json" if damage == "manifest" else "rows.arrow")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.unlink()
    if damage != "gone":
        file.write_bytes(content[:-100] if damage == "cut" else content)
    with caplog.at_level(logging.WARNING, "qd2mora"):
        assert [facts(row) for row in prepare(data, tokenizer, 0)[0].train] == wanted
    assert "made anew" in caplog.text
    prepare(data, tokenizer, 0)
    assert len(caplog.text.split("made anew")) == 2


def test_a_cache_that_cannot_be_written_stops_nothing(
    tokenizer: PreTrainedTokenizerBase, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.parent.write_text("a file in the place of the folder", encoding="utf-8")
    with caplog.at_level(logging.WARNING, "qd2mora"):
        assert len(prepare(save(tmp_path, 50), tokenizer, 0)[0].train) == 40
    assert "stay in memory" in caplog.text
    cache.parent.unlink()
    with pytest.raises(InputRefused, match="row 1: no field"):
        prepare(save(tmp_path, 50).model_copy(update={"on_bad_row": "error"}), tokenizer, 0)
    assert not list(cache.iterdir())


def test_what_is_long_unused_or_beyond_the_limit_is_removed_and_what_is_in_use_is_not(
    tokenizer: PreTrainedTokenizerBase, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kept(number: int) -> set[str]:
        prepare(save(tmp_path, number), tokenizer, 0)
        return {entry.name for entry in cache.iterdir()}

    (old,) = kept(50)
    fresh = kept(60) - {old}
    half_written = cache / ".partial-k2j4_x9a"
    half_written.mkdir()
    killed = cache / f".{old}.{2**22 + 7}-0badcafe.partial"  # of a process whose number no system gives
    killed.mkdir()
    theirs = cache / "notes"
    theirs.mkdir()
    (theirs / "thesis.tex").write_text("years of work")
    days = 86400
    for entry, age in ((cache / old, 31 * days), (half_written, 2 * days)):
        os.utime(entry, (entry.stat().st_atime, entry.stat().st_mtime - age))
    prepare(save(tmp_path, 50), tokenizer, 0)  # used today: it stays
    both = {old, *fresh}
    assert kept(70) > both and not half_written.exists() and not killed.exists()
    os.utime(cache / old, (0, 0))
    assert not kept(80) & {old}
    monkeypatch.setenv("QD2MORA_CACHE_GIB", "0")
    mapped = prepare(save(tmp_path, 60), tokenizer, 0)[0]
    assert (
        len(kept(90)) == 2
        and (theirs / "thesis.tex").is_file()
        and len(mapped.train) == 50
        and mapped.train[0].pair.prompt
    )
    monkeypatch.setenv("QD2MORA_CACHE_GIB", "much")
    with pytest.raises(InputRefused, match="QD2MORA_CACHE_GIB: 'much'"):
        kept(100)


_SCRIPT = """
import sys, threading, time
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from qd2mora.data import TaskMix, prepare
from qd2mora.recipe import Data, Task

model = Tokenizer(models.WordLevel({"</s>": 0, "<u>": 1, "red": 2, "sun": 3}, "<u>"))
model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<u>", eos_token="</s>")
peak, is_done = [0], []

def own_memory():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

def watch():
    while not is_done:
        peak[0] = max(peak[0], own_memory())
        time.sleep(0.01)

def run(path):
    tasks = prepare(Data(tasks=[Task(name="t", path=path, format="completion")]), tokenizer, 0)
    mixture = TaskMix(Data(tasks=[tasks[0].task]), tasks, 0)
    return sum(len(row.ids) for start in range(0, len(tasks[0].train), 64) for row in mixture.rows(start, 64))

run(sys.argv[1])  # what the libraries take once
before = own_memory()
threading.Thread(target=watch, daemon=True).start()
tokens = run(sys.argv[2])
is_done.append(1)
print(tokens, peak[0] - before)
"""


@pytest.mark.long
def test_a_large_file_takes_little_memory_of_its_own(tmp_path: Path) -> None:
    """Pages of the mapped file are the system's to take back, so it is the process's own memory that is measured."""
    line = json.dumps({"prompt": "red", "completion": ("sun" * 70 + " ") * 400}) + "\n"
    (tmp_path / "warm.jsonl").write_text(line * 60, encoding="utf-8")
    (tmp_path / "large.jsonl").write_text(line * 1200, encoding="utf-8")
    size = (tmp_path / "large.jsonl").stat().st_size
    environment = os.environ | {"QD2MORA_CACHE": str(tmp_path / "cache"), "TOKENIZERS_PARALLELISM": "false"}
    files = [str(tmp_path / name) for name in ("warm.jsonl", "large.jsonl")]
    found = subprocess.run(
        [sys.executable, "-c", _SCRIPT, *files], env=environment, capture_output=True, text=True, check=True
    )
    tokens, grown = map(int, found.stdout.split())
    assert tokens == 19 * 64 * 402 and size > 90 << 20
    assert grown < 30 << 20, f"{grown / 2**20:.0f} MiB"


def test_lengths_of_rows_equal_the_rows(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = prepare(save(tmp_path, 3000).model_copy(update={"max_length": 9}), tokenizer, 0)[0]
    assert np.array_equal(rows.lengths, [len(row.ids) for row in rows.train])
    assert rows.num_cut == sum(row.ids[-1] != tokenizer.eos_token_id for row in rows.train) > 0
