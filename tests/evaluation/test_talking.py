"""Talking: what is written is transformers' own text, comes in pieces, and goes by the template that was trained."""

import io
import shutil
import sys
from pathlib import Path

import pytest
import tiny
import torch
from exported import make_run
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qd2mora.cli import main
from qd2mora.data.instruction import split
from qd2mora.errors import InputRefused
from qd2mora.evaluation import TalkOptions, chat, generate
from qd2mora.evaluation.subject import model_mark
from qd2mora.merging import ExportOptions, merge

TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}[assistant]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, its exports, and the base with a chat template."""
    folder = tmp_path_factory.mktemp("talking")
    run = make_run(folder, "d2mora")
    for name, to, dtype in (("exact", "exact", "float32"), ("nf4", "exact", "nf4")):
        merge(run, folder / name, ExportOptions(to=to, dtype=dtype, measured_rows=0))
    # One static update in two forms, whichever it is.
    for name, to in (("hf", "hf"), ("lora", "lora")):
        merge(run, folder / name, ExportOptions(to=to, dtype="float32", strategy="core_lsq", measured_rows=0))
    tiny.save_base(folder / "talker", seed=3)
    tokenizer = AutoTokenizer.from_pretrained(folder / "talker")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "talker")
    return folder


def theirs(folder: Path, text: str, *, special: bool = True, **settings: object) -> str:
    """What transformers' own generate writes."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=special)
    out = model.generate(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"], **settings)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_text_is_that_of_transformers_own_generate(folder: Path) -> None:
    for raw in (True, False):
        text = "red sun" if raw else split({"instruction": "red sun", "output": ""})[0]
        ours = generate(folder / "hf", "red sun", TalkOptions(max_new_tokens=12), raw=raw)
        assert ours == theirs(folder / "hf", text, max_new_tokens=12, do_sample=False) != ""


def test_drawn_text_is_transformers_own_and_the_seed_decides_it(folder: Path) -> None:
    drawn = [
        generate(folder / "hf", "red", TalkOptions(max_new_tokens=12, temperature=1.5, top_p=0.9, seed=seed), raw=True)
        for seed in (7, 7, 8)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    torch.manual_seed(7)
    settings = {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "top_k": 0, "max_new_tokens": 12}
    assert drawn[0] == theirs(folder / "hf", "red", **settings)


def test_drawing_leaves_the_callers_random_numbers_alone(folder: Path) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    generate(folder / "talker", "red", TalkOptions(max_new_tokens=3, temperature=1.0), raw=True)
    assert torch.get_rng_state().equal(before)


def test_text_comes_in_pieces_that_make_up_the_whole(folder: Path) -> None:
    pieces: list[str] = []
    text = generate(folder / "run-d2mora-nf4", "red", TalkOptions(max_new_tokens=20), raw=True, write=pieces.append)
    assert "".join(pieces) == text and sum(map(bool, pieces)) > 5


def test_exports_of_the_routed_model_and_loras_answer_like_the_run_and_the_merge(folder: Path) -> None:
    run = generate(folder / "run-d2mora-nf4", "red sun", TalkOptions(max_new_tokens=12))
    assert generate(folder / "exact", "red sun", TalkOptions(max_new_tokens=12)) == run
    assert generate(folder / "nf4", "red sun", TalkOptions(max_new_tokens=12)) == run
    merged = generate(folder / "hf", "red sun", TalkOptions(max_new_tokens=12))
    assert generate(folder / "lora", "red sun", TalkOptions(max_new_tokens=12)) == merged


def test_the_mark_of_a_lora_is_its_own_and_changes_with_its_weights(folder: Path, tmp_path: Path) -> None:
    lora = shutil.copytree(folder / "lora", tmp_path / "lora")
    mark = model_mark(lora)
    assert mark == model_mark(folder / "lora")
    assert mark not in {model_mark(folder / name) for name in ("run-d2mora-nf4", "hf", "exact", "talker")}
    weights = lora / "adapter_model.safetensors"
    save_file({name: value + 1 for name, value in load_file(weights).items()}, weights)
    assert model_mark(lora) != mark


def test_a_routed_export_with_other_code_is_refused(folder: Path, tmp_path: Path) -> None:
    for path in (folder / "exact").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "manifest.json").unlink()  # with it, the change alone would be damage
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("modeling_mixture.Mixture", "other.Mixture", 1))
    with pytest.raises(InputRefused, match="auto_map asks for code of its own"):
        generate(tmp_path, "red")


def test_a_conversation_goes_through_the_chat_template_with_all_that_was_said(folder: Path) -> None:
    written: list[str] = []
    chat(
        folder / "talker",
        ["red sun\n", "\n", "blue\n", "/new\n", "red sun\n"],
        written.append,
        TalkOptions(max_new_tokens=4),
    )
    first, second, third = "".join(written).removesuffix("\n").split("\n")
    settings = {"special": False, "max_new_tokens": 4, "do_sample": False}
    assert first == third == theirs(folder / "talker", "<s>[user] red sun [assistant]", **settings)
    said = f"<s>[user] red sun [assistant] {first} [user] blue [assistant]"
    assert second == theirs(folder / "talker", said, **settings)


def test_a_run_is_asked_as_it_was_trained_and_a_template_can_be_named(folder: Path) -> None:
    talker = folder / "talker"
    settings = {"max_new_tokens": 6, "do_sample": False}
    asked = split({"instruction": "red", "output": ""})[0]
    assert generate(talker, "red", TalkOptions(template="instruction", max_new_tokens=6)) == theirs(
        talker, asked, **settings
    )
    chatml = "<|im_start|>user\nred<|im_end|>\n<|im_start|>assistant\n"
    wanted = theirs(talker, chatml, special=False, **settings)
    assert generate(talker, "red", TalkOptions(template="chatml", max_new_tokens=6)) == wanted
    with pytest.raises(InputRefused, match="has no chat template; there are instruction, chatml, plain"):
        generate(folder / "hf", "red", TalkOptions(template="tokenizer"))
    with pytest.raises(InputRefused, match="--template: unknown 'chatlm'; did you mean 'chatml'"):
        generate(folder / "hf", "red", TalkOptions(template="chatlm"))


def test_text_ends_where_the_model_does_and_a_conversation_that_outgrew_it_goes_on(folder: Path) -> None:
    written: list[str] = []
    chat(folder / "talker", ["red " * 300, "red sun", "/new", "red sun"], written.append, TalkOptions(max_new_tokens=4))
    refused, *answers = "".join(written).removesuffix("\n").split("\n")
    assert "tokens, the model is made for 256" in refused and refused.endswith("/new forgets what was said")
    assert answers[0] == answers[1] != ""
    with pytest.raises(InputRefused, match="the model is made for 256"):
        generate(folder / "hf", "red " * 300, raw=True)
    tokenizer = AutoTokenizer.from_pretrained(folder / "hf")
    text = "red " * 250
    room = 256 - len(tokenizer(text)["input_ids"])
    assert room > 0
    ours = generate(folder / "hf", text, TalkOptions(max_new_tokens=100), raw=True)
    assert ours == theirs(folder / "hf", text, max_new_tokens=room, do_sample=False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--task", "frist"], "--task: no task 'frist' in this run; there are first, last"),
        (["--temperature", "-1"], "--temperature: -1.0"),
        (["--top-p", "0"], "--top-p: 0.0"),
        (["--top-p", "0.5"], "--top-p: 0.5 draws nothing at temperature 0"),
        (["--vector", "1,2"], "--vector: this model reads none"),
    ],
)
@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_what_will_not_do_is_one_line_and_exit_code_2(
    verb: str,
    arguments: list[str],
    words: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompt = ["--prompt", "red"] if verb == "generate" else []
    monkeypatch.setattr(sys, "argv", ["qd2mora", verb, str(folder / "run-d2mora-nf4"), *prompt, *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert [words in line for line in capsys.readouterr().err.strip().splitlines()] == [True]


def test_the_chat_verb_reads_lines_and_ends_with_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("red sun\nblue\n"))
    monkeypatch.setattr(sys, "argv", ["qd2mora", "chat", str(folder / "run-d2mora-nf4"), "--max-new-tokens", "5"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    answers = [generate(folder / "run-d2mora-nf4", text, TalkOptions(max_new_tokens=5)) for text in ("red sun", "blue")]
    assert capsys.readouterr().out == "".join(f"{answer}\n" for answer in answers)
