"""Where answers end: every end that the base lists, and the sign with which a template closes a turn."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from qd2mora.base import load_tokenizer
from qd2mora.evaluation import TalkOptions, generate, open_subject
from qd2mora.evaluation.ends import Ends, ends_of

OPEN = "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}{% if m.role == 'assistant' %}SIGN{% endif %}\n"
OPEN += "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ends") / "base"
    return tiny.save_base(folder, seed=3, tied=False)


@pytest.fixture
def tokenizer(base: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(base))


def written(base: Path) -> tuple[list[int], str]:
    """What the base writes where nothing ends it, as tokens and as text."""
    subject = open_subject(base)
    ids = torch.tensor([subject.tokenizer("red sun")["input_ids"]])
    tokens = subject.continue_texts(ids, torch.ones_like(ids), 12)[0]
    return tokens, subject.texts_of([tokens])[0]


def test_every_end_that_generation_config_lists_ends_answers_of_every_verb(base: Path, tmp_path: Path) -> None:
    tokens, text = written(base)
    end = next(token for token in tokens[2:] if token not in tokens[:2])
    folder = Path(shutil.copytree(base, tmp_path / "base"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, end]}), encoding="utf-8")
    asked = generate(folder, "red sun", TalkOptions(max_new_tokens=12), raw=True)
    before, short = written(folder)
    assert before == tokens[: tokens.index(end)] and asked == short
    assert asked != text and text.startswith(asked)


@pytest.mark.parametrize("listed", [None, 5, [5, 7]])
def test_ends_are_the_tokenizers_and_the_listed_ones(listed: object, tokenizer: PreTrainedTokenizerBase) -> None:
    generation = GenerationConfig(eos_token_id=listed)
    wanted = {2} | (set(listed) if isinstance(listed, list) else {listed} - {None})
    assert set(ends_of(tokenizer, generation).ids) == wanted


@pytest.mark.parametrize(
    ("sign", "ids", "signs"), [("<pad>", {2, 3}, ()), ("</s>", {2}, ()), ("", {2}, ()), ("<|end|>", {2}, ("<|end|>",))]
)
def test_the_sign_that_closes_a_turn_is_an_end_as_a_token_or_as_text(
    sign: str, ids: set[int], signs: tuple[str, ...], tokenizer: PreTrainedTokenizerBase
) -> None:
    template = OPEN.replace("SIGN", sign)
    assert ends_of(tokenizer, None, [template]) == Ends(tuple(sorted(ids)), signs)
    tokenizer.chat_template = template
    assert ends_of(tokenizer, None) == Ends(tuple(sorted(ids)), signs)


def test_a_sign_that_is_text_ends_what_is_written_and_is_never_shown(base: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "base"))
    asked = TalkOptions(max_new_tokens=12, template="instruction")
    text = generate(folder, "red sun", asked)
    sign = next(text[at : at + 3] for at in range(4, len(text)) if text[at : at + 3].isascii() and text[at:].strip())
    sign = sign.strip()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = OPEN.replace("SIGN", sign)
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    pieces: list[str] = []
    short = generate(folder, "red sun", asked, write=pieces.append)
    assert short == text.split(sign)[0] == "".join(pieces) != text


def test_the_beginning_of_a_sign_waits_for_what_follows() -> None:
    ends = Ends((2,), ("<|im_end|>",))
    assert ends.settled("blue<|im") == "blue" and ends.settled("blue <") == "blue " and ends.settled("blue") == "blue"
    assert ends.settled("blue<|im_end|>\n<|im") == ends.cut("blue<|im_end|>\nuser") == "blue"
    assert ends.before([5, 6, 2, 7]) == [5, 6] and ends.before([5, 6]) == [5, 6]
