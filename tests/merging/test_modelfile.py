"""Modelfiles: Ollama's template, read by a small evaluator of Go's templates, words what the chat template does."""

import json
import re
from pathlib import Path

import chat_templates
import pytest
import tiny
from exported import make_run
from go_template import Message, evaluate
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qd2mora.data.chat import TEMPLATES
from qd2mora.data.chat_template import ChatTemplate
from qd2mora.data.instruction import split
from qd2mora.data.tokenise import special_tokens
from qd2mora.errors import InputRefused
from qd2mora.merging import ExportOptions, merge
from qd2mora.merging.modelfile import conversation_lines, gaps_of
from qd2mora.report.exports import show_export
from qd2mora.terminal import Screen

TALKS: list[list[str]] = [
    ["red sun"],
    ["one", "two", "three"],
    ["What is {{ .Prompt }}?", 'He said """no""".', "a\n\nb", "{% if x %}", "c"],
    ["zé 日", "", "end"],
    ["a" * 300],
]
FAMILIES = {
    name: getattr(chat_templates, name)
    for name in (
        *("LLAMA3", "MISTRAL", "QWEN25", "QWEN3", "GEMMA", "PHI3", "ZEPHYR", "CHATML", "SMOLLM2", "GRANITE"),
        *("DEEPSEEK", "LLAMA2", "MARKED"),
    )
} | TEMPLATES


def ten(has_system: bool) -> list[list[Message]]:
    talks = []
    for texts in TALKS:
        roles = ("user", "assistant")
        talk = [{"role": roles[place % 2], "content": text} for place, text in enumerate(texts)]
        talks += [
            talk,
            [{"role": "system", "content": "Be brief."}, *talk]
            if has_system
            else [*talk[:-1], talk[-1] | {"content": "again"}],
        ]
    return talks


def template_in(lines: str) -> str:
    found = re.search(r'^TEMPLATE """(.*?)"""$', lines, re.DOTALL | re.MULTILINE)
    assert found is not None and lines.count('"""') == 2
    return found[1]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", FAMILIES)
def test_ten_conversations_read_the_same_in_ollama(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    tokenizer.chat_template = FAMILIES[name]
    gaps = gaps_of(tokenizer)
    written = template_in("\n".join(conversation_lines(gaps, tokenizer)))
    has_system = gaps.after_system is not None
    assert has_system is (name != "GEMMA")
    with ChatTemplate(FAMILIES[name], special_tokens(tokenizer), "here") as template:
        for talk in ten(has_system):
            # This tokenizer's file has llama.cpp begin with <s>.
            wanted = template.render(talk, asking=True).removeprefix("<s>")
            assert evaluate(written, talk) == wanted


def test_a_template_that_words_by_more_than_roles_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ loop.index }} {{ m.content }}{% endfor %}"
    with pytest.raises(InputRefused, match="by more than the roles"):
        gaps_of(tokenizer)


def test_braces_and_quotes_of_a_template_stay_as_they_are(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = """{% for m in messages %}{{ '{{\"\"\"{{{' }}{{ m.content }}{% endfor %}"""
    written = template_in("\n".join(conversation_lines(gaps_of(tokenizer), tokenizer)))
    assert evaluate(written, [{"role": "user", "content": "red"}]) == '{{"""{{{red'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gguf")
    folder = tmp_path_factory.mktemp("modelfile")
    run = make_run(folder, "lora")
    for to in ("gguf", "gguf_lora"):
        merge(run, folder / to, ExportOptions(to=to, measured_rows=0))
    text = (run / "recipe.yaml").read_text(encoding="utf-8")
    (run / "recipe.yaml").write_text(text.replace("validation: 8}", "validation: 8, template: chatml}"))
    # Runs of before instructions could have a template had no clock.
    (run / "manifest.json").write_text(json.dumps({"clock": "2026-01-01T00:00:00"}), encoding="utf-8")
    merge(run, folder / "chatml", ExportOptions(to="gguf", measured_rows=0))
    merge(run, folder / "ids", ExportOptions(to="gguf", measured_rows=0, with_vocabulary=False))
    return folder


def test_an_instruction_is_worded_as_in_training_and_alone(folder: Path) -> None:
    lines = (folder / "gguf" / "Modelfile").read_text(encoding="utf-8")
    (file,) = (folder / "gguf").glob("*.gguf")
    assert lines.startswith(f"FROM ./{file.name}\n")
    assert 'PARAMETER stop "</s>"\n' in lines and "PARAMETER num_ctx 256\n" in lines
    for talk in ten(has_system=True):
        wanted = split({"instruction": talk[-1]["content"], "output": ""})[0]
        assert evaluate(template_in(lines), talk) == wanted


def test_a_lora_goes_on_a_base_that_its_user_names(folder: Path) -> None:
    lines = (folder / "gguf_lora" / "Modelfile").read_text(encoding="utf-8")
    (file,) = (folder / "gguf_lora").glob("*.gguf")
    assert f"\nFROM ./base.gguf\nADAPTER ./{file.name}\n" in lines and str(folder / "base") in lines.splitlines()[0]


def test_a_conversation_ends_at_its_templates_sign_and_token_ids_alone_have_no_modelfile(folder: Path) -> None:
    lines = (folder / "chatml" / "Modelfile").read_text(encoding="utf-8")
    assert 'PARAMETER stop "<|im_end|>"\n' in lines and "llama.cpp begins every text with <s>" in lines
    sealed = json.loads((folder / "chatml" / "manifest.json").read_text(encoding="utf-8"))
    assert "Modelfile" in json.dumps(sealed)
    assert not (folder / "ids" / "Modelfile").exists()


def test_a_merge_tells_the_line_for_ollama_and_for_vllm(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = {}
    for to in ("gguf", "gguf_lora", "lora"):
        export = merge(folder / "run-lora-nf4", tmp_path / to, ExportOptions(to=to, measured_rows=0))
        show_export(export, tmp_path / to, Screen())
        told[to] = capsys.readouterr().out
    assert f"ollama create NAME -f {tmp_path / 'gguf' / 'Modelfile'}\n" in told["gguf"]
    assert "once its FROM names a GGUF file of the base" in told["gguf_lora"]
    line = f"vllm serve {folder / 'base'} --enable-lora --max-lora-rank 8 --lora-modules lora={tmp_path / 'lora'}\n"
    assert line in told["lora"] and "vllm" not in told["gguf"]
