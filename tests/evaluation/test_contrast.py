"""Contrast decoding and self-consistency: nothing to contrast is greedy decoding, and planted scores and votes win."""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from exported import make_run
from torch import Tensor

from qd2mora.cli import main
from qd2mora.errors import InputRefused
from qd2mora.evaluation import Contrast, Exam, ManyOptions, TalkOptions, Way, evaluate, generate, generate_file
from qd2mora.evaluation.contrast import weak_gate
from qd2mora.evaluation.decoding import Wanted
from qd2mora.evaluation.joint import JointDecoding
from qd2mora.evaluation.subject import Subject, open_subject
from qd2mora.evaluation.votes import majority
from qd2mora.mixture import mixture_layers
from qd2mora.routed.gate import Gate

TEXTS = ["red sun", "one two three", "moon bird cat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("contrast")
    make_run(folder, "mola", quantization="none", adapter="allocation: 4-4, ")
    make_run(folder, "lora", quantization="none")
    make_run(folder, "d2mora", quantization="none", adapter="gates: {down: {granularity: sequence}}, ")
    return folder


@pytest.fixture(scope="module")
def routed(folder: Path) -> Subject:
    return open_subject(folder / "run-mola-none")


def test_a_planted_score_is_what_the_formula_of_the_paper_gives() -> None:
    strong, weak = torch.tensor([2.0, 1.9, 0.5, -4.0]), torch.tensor([3.0, 1.0, -9.0, -90.0])
    found = Contrast("base", beta=0.5, alpha=0.1).blend(torch.stack([strong, weak]))
    # Token 3 is less than a tenth as likely as the likeliest: however weak the other model finds it, it is left out.
    torch.testing.assert_close(found, torch.tensor([1.5, 2.35, 5.25, -torch.inf]))
    torch.testing.assert_close(
        Contrast("base", beta=0.5, alpha=0.5).blend(torch.stack([strong, weak])).argmax(), torch.tensor(1)
    )


def written(subject: Subject, way: Way, number: int = 16) -> list[str]:
    """Return what is written after each text, all at once."""
    wanted = [Wanted(subject.tokenizer(text)["input_ids"], subject.ends, number) for text in TEXTS]
    decoding = way.decoding(subject, wanted)
    while not decoding.is_done:
        decoding.step()
    return [answer.text for answer in decoding.answers]


def test_kept_gates_write_the_same_alone_and_in_a_batch_and_at_one_token_what_is_written_without(
    routed: Subject,
) -> None:
    logs = {every: logs_of(routed, every) for every in (1, 3, 64)}
    for every, together in logs.items():
        alone = [logs_of(routed, every, [number])[0] for number in range(len(TEXTS))]
        for one, other in zip(alone, together, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    # The first token of an answer is the prompt's, the second decides; later ones go by what that decided.
    torch.testing.assert_close(logs[64][2][:2], logs[1][2][:2])
    assert not torch.allclose(logs[64][2], logs[1][2], atol=1e-3)
    assert not torch.allclose(logs[64][2], logs[3][2], atol=1e-3)


def logs_of(subject: Subject, every: int, numbers: Sequence[int] = range(3)) -> list[Tensor]:
    """Return the log probabilities of what is written with gates that are kept for so many tokens."""
    kept = subject.keeping_gates(every)
    ids = {number: kept.tokenizer(TEXTS[number])["input_ids"] for number in numbers}
    wanted = [Wanted(each, kept.ends, 8 + 4 * number) for number, each in ids.items()]
    decoding = Way(gates_every=every).decoding(kept, wanted)
    with kept.writing():
        while not decoding.is_done:
            decoding.step()
    return [torch.tensor([token.logprob for token in answer.chosen]) for answer in decoding.answers]


def test_gates_are_kept_where_they_change_from_token_to_token_alone(folder: Path) -> None:
    way = Way(gates_every=4)
    told = TalkOptions(max_new_tokens=8, way=way)
    for talk in (told, TalkOptions(max_new_tokens=8, way=Way())):
        assert isinstance(generate(folder / "run-mola-none", "red sun", talk), str)
    with pytest.raises(InputRefused, match="--gates-every: no gate of this model changes"):
        generate(folder / "run-lora-none", "red sun", told)
    with pytest.raises(InputRefused, match="--gates-every: gates are kept for one model"):
        Way(contrast=Contrast("base"), gates_every=4)


@pytest.mark.parametrize("weak", ["base", "top1", "uniform"])
def test_with_beta_0_it_is_greedy_and_with_more_it_is_not(routed: Subject, weak: str) -> None:
    greedy = written(routed, Way())
    for beta, same in ((0.0, True), (4.0, False)):
        assert (written(routed, Way(Contrast(weak, beta, alpha=1e-3))) == greedy) is same


def test_texts_of_a_file_are_contrasted_as_one_that_is_streamed(routed: Subject, folder: Path, tmp_path: Path) -> None:
    run, prompts = folder / "run-mola-none", tmp_path / "p.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS), encoding="utf-8")
    options = TalkOptions(max_new_tokens=12, way=Way(Contrast("top1", beta=2.0)))
    generate_file(run, prompts, tmp_path / "out.jsonl", ManyOptions(options, raw=True, rows_at_once=3))
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    pieces: list[str] = []
    alone = generate(run, TEXTS[1], options, raw=True, write=pieces.append)
    assert lines[1]["answer"] == alone == "".join(pieces) == written(routed, options.way or Way(), 12)[1]


def slow_contrast(subject: Subject, contrast: Contrast, ids: list[int], number: int) -> list[int]:
    """Return the tokens that the formula gives, both models read anew for each."""
    strong, weak = contrast.voices(subject)
    written: list[int] = []
    for _ in range(number):
        scores = []
        for voice in (strong, weak):
            subject.route({"task_index": torch.tensor([0])})
            with voice.state(), torch.no_grad():
                scores.append(subject.plain(torch.tensor([ids + written]), use_cache=False).logits[0, -1].float())
        kept = scores[0] >= scores[0].max() + torch.tensor(contrast.alpha).log()
        score = (1 + contrast.beta) * scores[0] - contrast.beta * scores[1]
        written.append(int(torch.where(kept, score, -torch.inf).argmax()))
    return written


@pytest.mark.parametrize("weak", ["base", "top1", "uniform"])
def test_cached_voices_say_what_both_models_read_anew_say(routed: Subject, weak: str) -> None:
    contrast, ids = Contrast(weak, beta=2.0, alpha=1e-2), [5, 9, 11, 40]
    decoding = JointDecoding(contrast.voices(routed), contrast.blend, [Wanted(ids, routed.ends, 8)])
    while not decoding.is_done:
        decoding.step()
    found = [each.token for each in decoding.answers[0].chosen]
    assert found == slow_contrast(routed, contrast, ids, len(found))


def test_weak_gates_take_one_expert_or_all_alike_and_come_back(routed: Subject) -> None:
    layer = next(layer for layer in mixture_layers(routed.model).values() if layer.mixture_spec["default"].step.gates)
    x = torch.randn(1, 5, layer.in_features)
    routed.route({"task_index": torch.tensor([0])})

    def weights() -> torch.Tensor:
        return layer.gatings(x, "default")["down"].weight

    before = weights()
    num = before.shape[-1]
    for weak, wanted in (
        ("top1", (before == before.amax(-1, keepdim=True)).float()),
        ("uniform", torch.full_like(before, 1 / num)),
    ):
        with Contrast(weak).voices(routed)[1].state():
            torch.testing.assert_close(weights(), wanted)
    torch.testing.assert_close(weights(), before)


def test_a_gate_that_chooses_nothing_has_no_weak_form() -> None:
    static = Gate("none", score="static")
    assert weak_gate(static, 3, "top1") == static
    assert weak_gate(Gate(select="top_k", weight="one", top_k=2), 4, "uniform").omega == 0.5


@pytest.mark.parametrize(
    ("run", "weak", "words"),
    [
        ("run-lora-none", "top1", "no gate of this adapter chooses; base will do"),
        ("run-d2mora-none", "base", "keeps something of each prompt"),
        ("base", "base", "no adapter beside its base"),
    ],
)
def test_what_has_no_weak_model_is_refused(folder: Path, run: str, weak: str, words: str) -> None:
    with pytest.raises(InputRefused, match=words):
        generate(folder / run, "red", TalkOptions(way=Way(Contrast(weak))), raw=True)


def test_most_samples_win_ties_go_to_the_first_and_silence_does_not_vote() -> None:
    def number(text: str) -> str:
        return "".join(letter for letter in text if letter.isdigit())

    found = majority(["it is 7", "so 4", "hence 4", "no idea", "no idea", "nothing"], number)
    assert (found.text, found.count, found.samples, found.is_tied) == ("so 4", 2, 6, False)
    assert found.line == "2 of 6 samples agree"
    tied = majority(["1", "2", "2", "1"], number)
    assert (tied.text, tied.is_tied) == ("1", True) and "the one drawn first counts" in tied.line


def test_rows_are_scored_by_what_most_samples_say(folder: Path) -> None:
    run = folder / "run-mola-none"
    plain = evaluate(run, Exam(limit=4))
    same = evaluate(run, Exam(limit=4, way=Way(Contrast("top1", beta=0.0))))
    assert {name: score.records for name, score in same.items()} == {
        name: score.records for name, score in plain.items()
    }
    drawn = evaluate(run, Exam(limit=4, way=Way(samples=3, temperature=5.0, extract=r"\w")))
    # At such a temperature three samples of a random model seldom agree: ties are there, and told.
    assert sum(score.tied for score in drawn.values()) > 0
    assert all(
        score.metric == "extract" and len(record.text) <= 1 for score in drawn.values() for record in score.records
    )


def test_the_command_line_says_how_samples_voted(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(folder / "run-mola-none")
    asked = ["generate", run, "--prompt", "red", "--raw", "--max-new-tokens", "4", "--samples", "3"]
    monkeypatch.setattr(sys, "argv", ["qd2mora", *asked])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0 and "of 3 samples agree" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--contrast", "bse"], "--contrast: 'bse' will not do: base, top1 or uniform"),
        (["--contrast", "base", "--beta", "-1"], "--beta: -1.0 will not do"),
        (["--contrast", "base", "--alpha", "0"], "--alpha: 0.0 will not do"),
        (["--beta", "1"], "--beta, --alpha: go with --contrast"),
        (["--extract", "("], "--extract: '(' is no regular expression"),
    ],
)
def test_ways_that_will_not_do_are_one_line(
    folder: Path, options: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["qd2mora", "eval", str(folder / "run-mola-none"), *options])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert [words in line for line in capsys.readouterr().err.strip().splitlines()] == [True]


@pytest.mark.parametrize("temperature", [-1.0, 1e-9, 1e9, math.nan])
def test_samples_are_drawn_at_a_temperature_that_can_be_drawn_at(temperature: float) -> None:
    for make in (lambda: Way(samples=3, temperature=temperature), lambda: TalkOptions(temperature=temperature)):
        with pytest.raises(InputRefused, match=f"--temperature: {temperature} will not do"):
            make()
