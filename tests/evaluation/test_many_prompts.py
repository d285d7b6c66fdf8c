"""Many prompts at once: each is answered as if it were alone, a kill takes nothing, a bad row is one line."""

import json
import sys
from pathlib import Path

import pytest
from exported import make_run

from qd2mora.cli import main
from qd2mora.errors import InputRefused
from qd2mora.evaluation import TalkOptions, generate
from qd2mora.evaluation.decoding import Decoding, Wanted
from qd2mora.evaluation.many_prompts import ManyOptions, generate_file
from qd2mora.evaluation.prompting import Prompting
from qd2mora.evaluation.subject import open_subject
from qd2mora.merging import ExportOptions, merge

TEXTS = ["red sun", "one two three", "moon", "say " * 20, "bird", "green cat dog"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    run = make_run(folder, "d2mora")
    merge(run, folder / "exact", ExportOptions(to="exact", dtype="float32", measured_rows=0))
    make_run(folder, "moelora")
    make_run(folder, "d2mora", quantization="none", adapter="gates: {down: {granularity: sequence}}, ")
    write(folder / "prompts.jsonl", *({"prompt": text, "id": f"p{place}"} for place, text in enumerate(TEXTS)))
    return folder


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def answers(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("subject", ["run-d2mora-nf4", "exact", "run-d2mora-none"])
@pytest.mark.parametrize("drawn", [{}, {"temperature": 1.5, "top_p": 0.9, "seed": 7}])
def test_a_row_of_a_batch_is_answered_as_a_prompt_alone(
    folder: Path, tmp_path: Path, subject: str, drawn: dict[str, float]
) -> None:
    options = TalkOptions(max_new_tokens=12, **drawn)  # type: ignore[arg-type]
    out = tmp_path / "answers.jsonl"
    generate_file(folder / subject, folder / "prompts.jsonl", out, ManyOptions(options, raw=True, rows_at_once=4))
    found = answers(out)
    assert [row["row"] for row in found] == [1, 2, 3, 4, 5, 6] and found[2]["id"] == "p2"
    for row, text in zip(found, TEXTS, strict=True):
        assert row["answer"] == generate(folder / subject, text, options, raw=True)
        assert row["finish"] in ("stop", "length")
    # Worded, these prompts would all read nearly the same.
    assert len({row["answer"] for row in found}) > 3


def test_tasks_of_rows_reach_the_routers(folder: Path, tmp_path: Path) -> None:
    run = folder / "run-moelora-nf4"
    prompts = write(tmp_path / "p.jsonl", *({"prompt": "red sun", "task": name} for name in ("first", "last", "first")))
    generate_file(run, prompts, tmp_path / "out.jsonl", ManyOptions(TalkOptions(max_new_tokens=10)))
    first, last, again = (row["answer"] for row in answers(tmp_path / "out.jsonl"))
    assert first == again == generate(run, "red sun", TalkOptions(task="first", max_new_tokens=10))
    subject = open_subject(run)
    with Prompting(subject) as prompting:
        decoding = Decoding(subject, [Wanted([5, 9, 11], prompting.ends, 1, task=task) for task in (0, 1, 0)])
    decoding.step()
    logprobs = [answer.chosen[0].logprob for answer in decoding.answers]
    assert logprobs[0] == pytest.approx(logprobs[2], abs=1e-5) != logprobs[1]
    assert last == generate(run, "red sun", TalkOptions(task="last", max_new_tokens=10))


def test_rows_that_end_leave_the_batch_and_a_stop_ends_them(folder: Path) -> None:
    subject = open_subject(folder / "run-d2mora-nf4")
    with Prompting(subject) as prompting:
        ids = [prompting.of_text(text) for text in TEXTS[:3]]
        decoding = Decoding(subject, [Wanted(each, prompting.ends, 3 + 4 * place) for place, each in enumerate(ids)])
        widths = []
        while not decoding.is_done:
            widths.append(len(decoding.live))
            decoding.step()
        assert widths == [3] * 3 + [2] * 4 + [1] * 4
        text = decoding.answers[2].text
        stop = text[len(text) // 2 :][:3]
        stopped = Decoding(subject, [Wanted(ids[2], prompting.ends, 11, stops=(stop,))])
        while not stopped.is_done:
            stopped.step()
        assert stopped.answers[0].finish == "stop" and stopped.answers[0].text == text.split(stop)[0] != text
        assert decoding.answers[2].finish == "length"


def test_after_a_kill_the_same_command_ends_with_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, how = folder / "run-d2mora-nf4", ManyOptions(TalkOptions(max_new_tokens=6), rows_at_once=2)
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    generate_file(run, folder / "prompts.jsonl", whole, how)
    step, steps = Decoding.step, 0

    def dies(decoding: Decoding) -> list[int]:
        nonlocal steps
        steps += 1
        if steps == 9:  # in the second batch
            raise KeyboardInterrupt
        return step(decoding)

    monkeypatch.setattr(Decoding, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        generate_file(run, folder / "prompts.jsonl", broken, how)
    part = tmp_path / "broken.jsonl.part"
    assert not broken.exists() and len(part.read_bytes().splitlines()) == 3
    part.write_bytes(part.read_bytes() + b'{"row": 3, "answ')  # a line that a power cut left
    with pytest.raises(InputRefused, match="another question"):
        generate_file(run, folder / "prompts.jsonl", broken, ManyOptions(TalkOptions(max_new_tokens=7)))
    steps = 100
    generate_file(run, folder / "prompts.jsonl", broken, how)
    assert steps <= 100 + 12 and broken.read_bytes() == whole.read_bytes() and not part.exists()
    with pytest.raises(InputRefused, match="is there already"):
        generate_file(run, folder / "prompts.jsonl", broken, how)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "row 2 is no JSON object"),
        ("[1]", "row 2 is no object"),
        ('{"text": "a"}', "row 2: unknown field 'text'; there are prompt"),
        ('{"prompt": 1}', "row 2: 'prompt' is 1, and not a text"),
        ('{"prompt": "a", "task": "frist"}', "row 2: --task: no task 'frist'"),
        ('{"messages": []}', "row 2: 'messages' is []"),
        ('{"messages": [{"role": "user"}]}', "row 2: {'role': 'user'} is no message"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "row 2: the last message is not the user's"),
        ('{"prompt": "\\ud800"}', "row 2: U+D800 is half a letter"),
        ('{"prompt": "a", "vector": [1, 2]}', "row 2: --vector: this model reads none"),
        (json.dumps({"prompt": "red " * 300}), "row 2: the prompt has"),
    ],
)
def test_a_row_that_will_not_do_is_one_line_and_nothing_is_written(
    folder: Path,
    tmp_path: Path,
    line: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompts, out = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "red"}\n' + line + "\n", encoding="utf-8")
    asked = ["qd2mora", "generate", str(folder / "run-d2mora-nf4"), "--file", str(prompts), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", asked)
    with pytest.raises(SystemExit) as ended:
        main()
    *_, last = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and words in last and last.startswith("error: ")
    assert not out.exists() and not list(tmp_path.glob("out.jsonl.part"))


def test_the_verb_wants_a_prompt_or_a_file_with_a_place_for_its_answers(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(folder / "run-d2mora-nf4")
    for given in ([], ["--prompt", "a", "--file", "b", "--out", "c"], ["--file", "b"], ["--prompt", "a", "--out", "c"]):
        monkeypatch.setattr(sys, "argv", ["qd2mora", "generate", run, *given])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2 and capsys.readouterr().err.startswith("error: --")
