"""Conversations: worded by a template in its sandbox, the assistant's turns learned, the rest given."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from qd2mora.base.passes import IGNORE
from qd2mora.data import Pair, TokenRows, collate, prepare, read_pairs
from qd2mora.data.chat_template import ChatTemplate
from qd2mora.data.conversation import read_conversation
from qd2mora.data.file_rows import BadRow
from qd2mora.data.notes import notes
from qd2mora.data.tokenise import Tokeniser
from qd2mora.data.turns import Turns
from qd2mora.errors import InputRefused
from qd2mora.recipe import Data, Task

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if loop.index0 and m.role == messages[loop.index0 - 1].role %}"
    "{{ raise_exception('roles alternate') }}{% endif %}[{{ m.role }}]\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
TALK = [
    {"role": "user", "content": "red sun"},
    {"role": "assistant", "content": "blue"},
    {"role": "user", "content": "green"},
    {"role": "assistant", "content": "moon star"},
]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def save(folder: Path, talks: list[object], name: str = "messages") -> Task:
    path = folder / "talks.jsonl"
    path.write_text("\n".join(json.dumps({name: talk}) for talk in talks), encoding="utf-8")
    return Task(name="t", path=str(path), format="chat")


@pytest.fixture(scope="module")
def template() -> Iterator[ChatTemplate]:
    with ChatTemplate(TEMPLATE, TOKENS, "here") as opened:
        yield opened


@pytest.fixture
def chatty(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> PreTrainedTokenizerBase:
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    return tokenizer


def test_only_the_assistants_turns_with_their_ends_are_learned(chatty: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    task = save(tmp_path, [TALK, TALK]).model_copy(update={"validation": 1})
    (rows,) = prepare(Data(tasks=[task]), chatty, 0)
    (row,) = rows.train
    assert row.ids.tolist() == chatty.apply_chat_template(TALK)["input_ids"]
    labels = collate([row], chatty.pad_token_id)["labels"][0]
    learned = labels[labels != IGNORE]
    assert chatty.decode(learned) == "blue</s>\nmoon star</s>\n"
    assert row.num_labels == len(learned)
    (asked,) = rows.validation
    assert chatty.decode(asked.ids[asked.masked :]) == "moon star</s>\n" and asked.pair.answer == "moon star"
    whole = prepare(Data(tasks=[task], mask_prompt=False), chatty, 0)[0].train[0]
    assert whole.num_labels == len(whole.ids) - 1


def test_a_conversation_that_is_cut_learns_what_is_left_of_its_turns(
    chatty: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    (made,) = prepare(Data(tasks=[save(tmp_path, [TALK])]), chatty, 0)
    assert isinstance(made.train, TokenRows)

    def rows(max_length: int) -> TokenRows:
        return TokenRows(made.train.store, made.train.places, 0, max_length, "turns")

    ((start, stop),) = rows(512)[0].earlier
    cut = rows(stop - 1)
    assert cut.is_cut.all() and cut.is_learned.all() and cut[0].num_labels == stop - 1 - start
    labels = collate([cut[0]], chatty.pad_token_id)["labels"][0]
    assert (labels != IGNORE).sum() == stop - 1 - start
    assert not rows(start).is_learned.any() and rows(start)[0].num_labels == 0


def test_shared_conversations_by_other_names_are_the_same(template: ChatTemplate, tmp_path: Path) -> None:
    roles = {"user": "human", "assistant": "gpt"}
    theirs = [{"from": roles[turn["role"]], "value": turn["content"]} for turn in TALK]
    names = {"messages": "conversations", "role": "from", "content": "value"}
    task = save(tmp_path, [theirs], "conversations").model_copy(update={"fields": names})
    (pair,) = read_pairs(task, task.path, None, template)
    task = save(tmp_path, [TALK])
    assert [pair] == read_pairs(task, task.path, None, template)
    assert pair.segments[1::2] == ("blue</s>\n", "moon star</s>\n") and pair.answer == "moon star"


@pytest.mark.parametrize("name", ["chatml", "plain"])
def test_a_tokenizer_without_a_template_is_named_and_takes_one_of_ours(
    name: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    task = save(tmp_path, [TALK])
    with pytest.raises(InputRefused, match="no chat template; name one of chatml, plain"):
        prepare(Data(tasks=[task]), tokenizer, 0)
    ours = task.model_copy(update={"template": name})
    (row,) = prepare(Data(tasks=[ours]), tokenizer, 0)[0].train
    ((start, stop),) = row.earlier
    assert tokenizer.decode(row.ids[start:stop]).startswith("blue")
    assert tokenizer.decode(row.ids[row.masked :]).startswith("moon star")


def test_an_answer_that_the_template_leaves_open_is_closed() -> None:
    def segments(talk: list[dict[str, str]], template: ChatTemplate, how: str | None = None) -> tuple[str, ...]:
        ((pair,), _) = Turns(template, how).pairs(read_conversation({"messages": talk}, {}))
        return pair.segments

    with ChatTemplate("{% for m in messages %}{{ m.content }} {% endfor %}", TOKENS, "here") as template:
        assert segments(TALK, template) == ("red sun ", "blue </s>", "green ", "moon star </s>")
    trimming = "{% for m in messages %}[{{ m.role }}]{{ m.content.split('|')[-1] | trim }}\n{% endfor %}"
    for answer in ("blue", "  blue ", "thought| blue"):
        with ChatTemplate(trimming, TOKENS, "here") as template:
            parts = segments([TALK[0], {"role": "assistant", "content": answer}], template)
        assert parts == ("[user]red sun\n", "[assistant]blue\n</s>")
    rewriting = (
        "{% for m in messages %}{{ m.content if loop.last or m.role == 'user' else m.content | upper }} {% endfor %}"
    )
    with ChatTemplate(rewriting, TOKENS, "here") as template, pytest.raises(BadRow, match="rewrites earlier turns"):
        segments(TALK, template, "together")


@pytest.mark.parametrize(
    ("talk", "words"),
    [
        ("red", "list of objects"),
        ([], "assistant's message is missing"),
        (TALK[:1], "assistant's message is missing"),
        ([{"role": "tool", "content": "x"}, *TALK], "role should be"),
        ([*TALK, {"role": "system", "content": "x"}], "role should be"),
        ([TALK[0], {"role": "assistant", "content": None}], "content should be text"),
        ([TALK[0], {"role": "assistant", "content": " "}], "missing or empty"),
        ([TALK[0], {"role": "assistant", "content": "a\0"}], "NUL"),
        ([TALK[0], TALK[0], TALK[1]], "refuses it: roles alternate"),
    ],
)
def test_a_conversation_that_will_not_do_is_refused_by_its_row(
    talk: object, words: str, template: ChatTemplate, tmp_path: Path
) -> None:
    task = save(tmp_path, [TALK, talk, TALK])
    with pytest.raises(InputRefused, match=rf"talks\.jsonl, row 2: .*{words}"):
        read_pairs(task, task.path, None, template)


def test_a_token_across_a_boundary_never_joins_what_is_given_and_what_is_learned() -> None:
    """A real byte-pair tokenizer whose merges join the end of the prompt with the start of the answer."""
    letters = {letter: number for number, letter in enumerate(["<u>", "</s>", "a", "b", ":", ":a", "b:", "ab"])}
    merges = [(":", "a"), ("b", ":"), ("a", "b")]
    model = Tokenizer(models.BPE(vocab=letters, merges=merges, unk_token="<u>"))
    model.pre_tokenizer = pre_tokenizers.Split("never", "isolated")
    crossing = PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<u>", eos_token="</s>")
    tokeniser = Tokeniser(crossing)
    assert crossing.convert_ids_to_tokens(crossing("b:ab")["input_ids"]) == ["b", ":a", "b"]
    pair, talk, clean = tokeniser.tokens(
        [Pair("b:", "ab"), Pair("", "", segments=("b:", "ab", "b:", "a")), Pair("", "", segments=("a", "b</s>"))]
    )
    assert crossing.convert_ids_to_tokens(pair.ids) == ["b:", "ab", "</s>"] and pair.bounds == (1,)
    assert crossing.convert_ids_to_tokens(talk.ids) == ["b:", "ab", "b:", "a"] and talk.bounds == (1, 2, 3)
    assert crossing.convert_ids_to_tokens(clean.ids) == ["a", "b", "</s>"] and clean.bounds == (1,)


def test_a_template_reads_the_time_that_its_run_began_at(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dated = "{{ strftime_now('%d %b %Y %H:%M') }}|" + TEMPLATE
    monkeypatch.setattr(tokenizer, "chat_template", dated)
    data = Data(tasks=[save(tmp_path, [TALK])])
    texts = []
    for _ in range(2):
        (rows,) = prepare(data, tokenizer, 0, "2020-02-01T10:30:00")
        texts.append(tokenizer.decode(rows.train[0].ids))
    assert texts[0] == texts[1] and texts[0].startswith("01 Feb 2020 10:30|")
    assert rows.reads_clock and "keeps the time that it began at" in next(notes(rows, tokenizer))
    (now,) = prepare(data, tokenizer, 0)
    assert "2020" not in tokenizer.decode(now.train[0].ids)
