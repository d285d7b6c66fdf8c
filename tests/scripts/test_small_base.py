"""The small base: prose from choices, and the same weights after a kill."""

import gzip
import json
from pathlib import Path

import make_small_base
import pytest
from safetensors.torch import load_file
from small_base_texts import documents, sentence
from torch import equal


@pytest.mark.parametrize(
    ("asked", "answer", "prose"),
    [
        (
            "Please answer, question: is it so?\n\nAnswer format: true/false",
            "true",
            "is it so? true.",
        ),
        (
            "Please choose the correct answer to the question: Why?\n\nAnswer1: no Answer2: because\n\nAnswer format: "
            "answer1/answer2",
            "answer2",
            "Why? because",
        ),
        (
            "Please choose the correct answer to fill in the blank: Ann asked _ to go.\n\nOption1: Tom Option2: Ben "
            "Answer format: option1/option2",
            "option2",
            "Ann asked Ben to go.",
        ),
    ],
)
def test_a_row_of_a_pool_is_prose_with_the_right_choice(asked: str, answer: str, prose: str) -> None:
    assert sentence({"instruction": asked, "answer": answer}) == prose


def save_data(folder: Path) -> Path:
    for name in ("commonsense/train", "multitask_cot", "math", "text"):
        (folder / name).mkdir(parents=True)
    rows = [{"instruction": f"Say: is {n} a number?\n\nAnswer format: a/b", "answer": "true"} for n in range(60)]
    with gzip.open(folder / "commonsense" / "train" / "boolq.json.gz", "wt", encoding="utf-8") as file:
        json.dump(rows, file)
    thought = [{"instruction": "Why?", "rationale": "Since it is.", "output": "so"}]
    (folder / "multitask_cot" / "ecqa.json").write_text(json.dumps(thought), encoding="utf-8")
    (folder / "math" / "gsm8k_train.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n', encoding="utf-8")
    for name in ("wikitext2_valid.tokens", "wikitext2_test.raw", "tinyshakespeare", "tinystories_sample"):
        (folder / "text" / f"{name}.txt").write_text(f"A text of {name}.\n" * 200, encoding="utf-8")
    return folder


@pytest.mark.long
def test_a_base_whose_making_was_killed_ends_with_the_same_weights(tmp_path: Path, monkeypatch) -> None:
    data = save_data(tmp_path / "data")
    assert len(documents(data)) > 60
    changes = {"LENGTH": 32, "BATCH": 2, "SAVE_EVERY": 1, "HELD_OUT": 4, "VOCABULARY": 320}
    for name, value in changes.items():
        monkeypatch.setattr(make_small_base, name, value)
    make_small_base.make(data, tmp_path / "whole", 0, 3)
    save = make_small_base.checkpoint.save

    def killed_after_the_second(folder, state, keep):
        save(folder, state, keep)
        if state.progress.step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(make_small_base.checkpoint, "save", killed_after_the_second)
        with pytest.raises(KeyboardInterrupt):
            make_small_base.make(data, tmp_path / "broken", 0, 3)
    with pytest.raises(SystemExit, match=r"holds a base of .'steps': 3"):
        make_small_base.make(data, tmp_path / "broken", 0, 4)  # another schedule
    make_small_base.make(data, tmp_path / "broken", 0, 3)
    whole, broken = (load_file(tmp_path / name / "base" / "model.safetensors") for name in ("whole", "broken"))
    assert whole.keys() == broken.keys() and all(equal(whole[name], broken[name]) for name in whole)
    report = json.loads((tmp_path / "broken" / "report.json").read_text(encoding="utf-8"))
    assert report["tokens_read"] == 3 * 2 * 32
