"""Ensembles: calibrated, weighed by what a prompt names, mixed or taking turns; each against a slow reference."""

import json
import logging
import sys
from pathlib import Path

import pytest
import torch
from exported import make_run

from qd2mora.cli import main
from qd2mora.data import Pair, Row
from qd2mora.evaluation import Exam, TalkOptions, Way, evaluate, generate
from qd2mora.evaluation.calibration import best_temperature, calibration_error
from qd2mora.evaluation.ensemble import Ensemble, EnsembleOptions, places_of, turns
from qd2mora.evaluation.subject import Subject, open_subject
from qd2mora.evaluation.ways import open_in_way

TEXTS = ["red sun", "moon bird cat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ensemble")
    for method in ("lora", "loramoe", "moelora"):
        make_run(folder, method, quantization="none")
    return folder


def members_of(folder: Path) -> list[Subject]:
    return [open_subject(folder / f"run-{method}-none") for method in ("lora", "loramoe")]


def options_of(folder: Path, **changes: object) -> EnsembleOptions:
    return EnsembleOptions((str(folder / "run-loramoe-none"),), **changes)  # type: ignore[arg-type]


def written(folder: Path, text: str, options: EnsembleOptions, number: int = 10) -> str:
    talk = TalkOptions(max_new_tokens=number, way=Way(ensemble=options))
    return generate(folder / "run-lora-none", text, talk, raw=True)


def slowly(members: list[Subject], text: str, mix: str, weights: list[float], number: int = 10) -> str:
    """What members say together, each text read anew for every token."""
    ids = members[0].tokenizer(text)["input_ids"]
    told = {"task_index": torch.tensor([0])}
    new: list[int] = []
    for place in range(number):
        logs = []
        for member in members:
            member.route(told)
            with torch.no_grad():
                logs.append(member.plain(torch.tensor([ids + new]), use_cache=False).logits[0, -1].log_softmax(-1))
        mixed = sum(weight * log for weight, log in zip(weights, logs, strict=True))
        if mix == "switch":
            mixed = logs[place % 2]
        assert isinstance(mixed, torch.Tensor)
        new.append(int(mixed.argmax()))
        if new[-1] in members[0].ends.ids:
            break
    return members[0].texts_of([members[0].ends.before(new)])[0]


@pytest.mark.parametrize("mix", ["composite", "switch"])
def test_members_say_together_what_their_scores_read_anew_say(folder: Path, mix: str) -> None:
    members = members_of(folder)
    for text in TEXTS:
        found = written(folder, text, options_of(folder, mix=mix))
        assert found == slowly(members, text, mix, [0.5, 0.5])
    alone = [generate(folder / "run-lora-none", text, TalkOptions(max_new_tokens=10), raw=True) for text in TEXTS]
    assert [written(folder, text, options_of(folder, mix=mix)) for text in TEXTS] != alone


def test_one_adapter_twice_is_that_adapter(folder: Path) -> None:
    run = folder / "run-lora-none"
    plain, both = (evaluate(run, Exam(limit=3, way=way)) for way in (None, Way(ensemble=EnsembleOptions((str(run),)))))
    for name, score in plain.items():
        assert [record.text for record in both[name].records] == [record.text for record in score.records]
        assert both[name].loss == pytest.approx(score.loss, rel=1e-4)


def test_choices_are_weighed_by_all_members(folder: Path) -> None:
    subject, way = open_in_way(folder / "run-lora-none", Way(ensemble=options_of(folder)))
    assert way is not None and way.together is not None
    row = Row(0, torch.tensor([5, 9, 11, 40, 2]).int().numpy(), 3, Pair("", ""))
    logs = []
    for member in way.together.members:
        member.route({"task_index": torch.tensor([0])})
        with torch.no_grad():
            logs.append(member.plain(torch.tensor([[5, 9, 11, 40]])).logits[0, 2:].log_softmax(-1))
    mean = (logs[0] + logs[1]).div(2).log_softmax(-1)
    wanted = -float(mean[0, 40] + mean[1, 2])
    assert way.losses(subject, [row])[0] == pytest.approx(wanted, rel=1e-4)
    (weighed,) = way.weigh(subject, [row], [[[40, 2], [41]]])
    assert weighed[0].loss == pytest.approx(wanted, rel=1e-4) and weighed[1].tokens == 1


def test_a_planted_temperature_is_found_and_lowers_the_error() -> None:
    torch.manual_seed(0)
    logits = 2 * torch.randn(4000, 6)
    labels = torch.distributions.Categorical(logits=logits).sample()
    assert best_temperature(logits, labels) == pytest.approx(1, abs=0.1)
    sure = 3 * logits  # three times as sure as it is right
    assert best_temperature(sure, labels) == pytest.approx(3, abs=0.3)
    assert calibration_error(sure, labels) > 0.15 > 0.05 > calibration_error(sure / 3, labels)


def test_the_error_of_calibration_is_the_textbooks() -> None:
    probabilities = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4]])
    # Two tokens at 0.9 of which one is right, one at 0.6 that is: 2/3 * 0.4 + 1/3 * 0.4.
    assert calibration_error(probabilities.log(), torch.tensor([0, 1, 0])) == pytest.approx(0.4, abs=1e-6)


def test_turns_are_as_many_as_the_weights_say() -> None:
    assert turns([0.5, 0.25, 0.25], 8) == [0, 1, 2, 0, 0, 1, 2, 0]
    assert [turns([0.7, 0.3], 100).count(member) for member in (0, 1)] == [70, 30]
    assert turns([1.0], 3) == [0, 0, 0]


def test_words_of_a_prompt_choose_the_member_whose_triggers_they_are(folder: Path, tmp_path: Path) -> None:
    names = [str(folder / f"run-{method}-none") for method in ("lora", "loramoe")]
    (tmp_path / "t.yaml").write_text(json.dumps({names[0]: ["sun", "star"], names[1]: ["cat"]}), encoding="utf-8")
    options = options_of(folder, triggers=tmp_path / "t.yaml")
    members = members_of(folder)
    assert written(folder, "moon bird cat", options) == slowly(members, "moon bird cat", "composite", [0.0, 1.0])
    assert written(folder, "red sun", options) == slowly(members, "red sun", "composite", [1.0, 0.0])
    assert written(folder, "moon bird", options) == slowly(members, "moon bird", "composite", [0.5, 0.5])
    # Of both, by how much likelier each adapter makes its own words.
    _, way = open_in_way(names[0], Way(ensemble=options))
    assert way is not None and way.together is not None
    ids = members[0].tokenizer("red sun moon cat")["input_ids"]
    drops = []
    for member, words in zip(members, way.together.triggers, strict=True):
        places = places_of(ids, words)
        logs = []
        for is_adapted in (True, False):
            member.route({"task_index": torch.tensor([0])})
            with torch.no_grad():
                if is_adapted:
                    out = member.plain(torch.tensor([ids])).logits
                else:
                    with member.without_adapter():
                        out = member.plain(torch.tensor([ids])).logits
            logs.append(torch.stack([out[0, place - 1].log_softmax(-1)[ids[place]] for place in places]).mean())
        drops.append(logs[0] - logs[1])
    found = way.together.weights(ids, {"task_index": torch.tensor([0])})
    torch.testing.assert_close(found, torch.stack(drops).softmax(0), atol=1e-5, rtol=1e-5)
    assert float((found - 0.5).abs().max()) > 2e-4


def test_calibration_is_told_and_mixes_calibrated_scores(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.WARNING, logger="qd2mora"):
        options = options_of(folder, calibrate=folder / "data" / "first.jsonl")
        _, way = open_in_way(folder / "run-lora-none", Way(ensemble=options))
    assert len([line for line in caplog.messages if "expected calibration error" in line]) == 2
    assert way is not None and isinstance(way.together, Ensemble) and 1.0 not in way.together.temperatures
    scores = torch.randn(2, 1, 7)
    wanted = sum(0.5 * (scores[n, 0] / way.together.temperatures[n]).log_softmax(-1) for n in (0, 1))
    torch.testing.assert_close(way.together.blended(scores, torch.full((2, 1), 0.5))[0], wanted)
    others = ["--ensemble", str(folder / "run-loramoe-none"), "--mix", "switch", "--limit", "2", "--json"]
    monkeypatch.setattr(sys, "argv", ["qd2mora", "eval", str(folder / "run-lora-none"), *others])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0 and json.loads(capsys.readouterr().out)["first"]["rows"] == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--calibrate", "rows.jsonl"], "--calibrate, --triggers, --mix: go with --ensemble"),
        (["--ensemble", "{0}/run-lora-none", "--mix", "mean"], "--mix: 'mean' will not do: composite or switch"),
        (["--ensemble", "{0}/run-moelora-none"], "reads the task or a vector of its own rows"),
        (["--ensemble", "{0}/run-loramoe-none", "--contrast", "base"], "leave out --ensemble"),
        (["--ensemble", "{0}/run-loramoe-none", "--triggers", "{0}/t.yaml"], "has no list of words for"),
    ],
)
def test_ensembles_that_will_not_do_are_one_line(
    folder: Path, options: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "t.yaml").write_text("a: [red]\n", encoding="utf-8")
    given = [option.format(folder) for option in options]
    monkeypatch.setattr(sys, "argv", ["qd2mora", "eval", str(folder / "run-lora-none"), *given])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert [words in line for line in capsys.readouterr().err.strip().splitlines()] == [True]
