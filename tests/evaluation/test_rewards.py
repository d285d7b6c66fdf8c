"""A reward run: its head, what it scores, and that picking by it is worth something."""

import json
from pathlib import Path
from random import Random
from typing import Any

import judged_runs as runs
import pytest
import tiny
from safetensors.torch import load_file

from qd2mora.cli import main
from qd2mora.errors import InputRefused
from qd2mora.evaluation import evaluate
from qd2mora.evaluation.rewards import score_answers
from qd2mora.merging import merge
from qd2mora.training import train

OTHERS = ["moon", "cat", "two"]


def answer_of(draw: Random, suns: int) -> str:
    """Return four words of which so many are planted ones: what an answer is worth."""
    words = ["sun"] * suns + [draw.choice(OTHERS) for _ in range(4 - suns)]
    draw.shuffle(words)
    return " ".join(words)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, pairs of answers with more and fewer of the planted words, and a reward run on them."""
    folder, draw = tmp_path_factory.mktemp("rewards"), Random(0)
    tiny.save_base(folder / "base")
    (folder / "data").mkdir()
    rows = []
    for _ in range(120):
        fewer, more = sorted(draw.sample(range(5), 2))
        prompt = f"Say {draw.choice(tiny.WORDS)}: "
        rows.append({"prompt": prompt, "chosen": answer_of(draw, more), "rejected": answer_of(draw, fewer)})
    (folder / "data" / "preference.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    train(runs.recipe_of(folder, folder / "run", "reward", "train.steps=40", "train.eval_every=40"))
    return folder


def test_the_best_of_eight_is_worth_more_than_the_mean_answer(made: Path, tmp_path: Path) -> None:
    draw, worth = Random(1), {}
    lines = []
    for word in tiny.WORDS:
        answers = [answer_of(draw, draw.randint(0, 4)) for _ in range(8)]
        worth |= {answer: answer.split().count("sun") for answer in answers}
        lines.append(json.dumps({"prompt": f"Say {word}: ", "answers": answers}))
    (tmp_path / "answers.jsonl").write_text("\n".join(lines), encoding="utf-8")
    found = score_answers(made / "run", tmp_path / "answers.jsonl", tmp_path / "out.jsonl")
    assert len(found) == 96 and sum(each.is_best for each in found) == 12
    mean = sum(worth[each.answer] for each in found) / len(found)
    best = [worth[each.answer] for each in found if each.is_best]
    most = [max(worth[each.answer] for each in found[start : start + 8]) for start in range(0, 96, 8)]
    assert sum(best) / 12 > mean + 0.8 * (sum(most) / 12 - mean)
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [each["reward"] for each in written] == [each.reward for each in found]
    for start in range(0, 96, 8):
        some = found[start : start + 8]
        assert sorted(each.rank for each in some) == list(range(1, 9)) and {each.of for each in some} == {8}
        assert max(some, key=lambda each: each.reward).is_best


def test_the_head_is_a_file_of_its_own_and_eval_agrees_with_training(made: Path) -> None:
    head = load_file(made / "run" / "adapter" / "reward_head.safetensors")
    assert head["weight"].shape == (1, 64)
    assert not any("head" in name for name in runs.adapter_of(made / "run"))
    (best,) = (made / "run" / "best").glob("step-*")
    assert (best / "reward_head.safetensors").is_file()
    last = [line for line in runs.lines_of(made / "run") if "eval_loss" in line][-1]
    score = evaluate(made / "run")["pick"]
    assert score.loss == pytest.approx(last["eval_loss"]["pick"], rel=1e-4)
    assert score.mean == pytest.approx(last["eval_measures"]["pick"]["accuracy"]) and score.mean >= 0.85


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "Say one: "}', "a row is an object with prompt and answer"),
        ('{"prompt": "Say one: ", "answers": []}', "'answers' should be a list"),
        ('{"prompt": "Say one: ", "answer": " "}', "field 'answer' is empty"),
        (
            json.dumps({"prompt": "Say one: ", "answer": "one two " * 60}),
            "tokens, the run scores up to data.max_length",
        ),
    ],
)
def test_what_cannot_be_scored_is_named_by_its_row(line: str, words: str, made: Path, tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").write_text('{"prompt": "Say one: ", "answer": "sun"}\n' + line, encoding="utf-8")
    with pytest.raises(InputRefused, match=words) as refused:
        score_answers(made / "run", tmp_path / "answers.jsonl", tmp_path / "out.jsonl")
    assert "answers.jsonl, line 2" in str(refused.value) or "answers.jsonl, row 2" in str(refused.value)
    assert not (tmp_path / "out.jsonl").exists()


def test_the_verb_prints_the_best_and_refuses_another_run(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: Any) -> int:
        monkeypatch.setattr("sys.argv", ["qd2mora", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0)

    path = tmp_path / "answers.jsonl"
    rows = [{"prompt": "Say one: ", "answer": answer} for answer in ("moon moon cat cat", "sun sun sun sun")]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert run("reward", made / "run", "--file", path) == 0
    assert "sun sun sun sun" in capsys.readouterr().out
    recipe = made / "run" / "recipe.yaml"
    other = tmp_path / "other"
    other.mkdir()
    text = recipe.read_text(encoding="utf-8").replace("kind: reward", "kind: simpo")
    assert text.count("head: linear") == 1
    text = text.replace("  head: linear\n", "")
    (other / "recipe.yaml").write_text(text, encoding="utf-8")
    assert run("reward", other, "--file", path) == 2
    assert "is no reward model" in capsys.readouterr().err


def test_scores_replace_earlier_scores_and_nothing_else(made: Path, tmp_path: Path) -> None:
    path, out = tmp_path / "answers.jsonl", tmp_path / "out.jsonl"
    row = json.dumps({"prompt": "Say one: ", "answer": "moon"}) + "\n"
    for each in (path, out):
        each.write_text(row, encoding="utf-8")
    with pytest.raises(InputRefused, match="is --file itself"):
        score_answers(made / "run", path, path)
    with pytest.raises(InputRefused, match="holds no scored answers"):
        score_answers(made / "run", path, out)
    assert path.read_text(encoding="utf-8") == out.read_text(encoding="utf-8") == row
    out.unlink()
    for _ in range(2):
        assert len(score_answers(made / "run", path, out)) == 1
    # Scored answers are rows too.
    with pytest.raises(InputRefused, match="is --file itself"):
        score_answers(made / "run", out, out)


def test_an_export_of_it_is_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="no place for the head"):
        merge(made / "run", tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_a_reward_run_that_goes_on_begins_with_the_head_of_its_start(made: Path, tmp_path: Path) -> None:
    adapter = f"{{start: {made / 'run'}}}"
    train(runs.recipe_of(made, tmp_path / "next", "reward", "train.steps=1", adapter=adapter))
    before = [line for line in runs.lines_of(made / "run") if "eval_loss" in line][-1]
    first = next(line for line in runs.lines_of(tmp_path / "next") if "eval_loss" in line)
    assert first["eval_loss"]["pick"] == pytest.approx(before["eval_loss"]["pick"], rel=1e-4)
    identity = json.loads((tmp_path / "next" / "manifest.json").read_text(encoding="utf-8"))["identity"]
    assert len(identity["adapter.start.head"]) == 64
