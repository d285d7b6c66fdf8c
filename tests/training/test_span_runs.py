"""Span adapters from recipe to answers: two formats, packed as padded, resumed to the bit, asked, and not exported."""

import json
import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from qd2mora.data.collate import collate
from qd2mora.errors import InputRefused
from qd2mora.evaluation import Exam, ManyOptions, TalkOptions, chat, evaluate, generate, generate_file
from qd2mora.merging import ExportOptions, merge
from qd2mora.mixture import read_rows
from qd2mora.recipe import Recipe, load_recipe
from qd2mora.run_folder import open_run
from qd2mora.serving.served import open_all
from qd2mora.training import train

WORDS = ["red", "blue", "green", "moon"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    tiny.save_base(folder / "base")
    rows, talks = [], []
    for number in range(24):
        first, last, name = WORDS[number % 4], WORDS[(number + 1) % 4], ("one", "two")[number % 2]
        prompt, answer = f"Say {first} or {last}: ", first if name == "one" else last
        rows.append({"prompt": prompt, "completion": answer, "spans": [span("field", "completion", name)]})
        rows[-1]["spans"].append(span("field", "prompt", name) | {"start": 4, "end": 4 + len(first)})
        said = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        talks.append({"messages": said, "spans": [span("message", 1, name)]})
    for name, content in (("rows", rows), ("talks", talks)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return folder


def span(key: str, place: object, name: str) -> dict[str, object]:
    return {key: place, "adapter": name}


def recipe(made: Path, run: Path, *overrides: str, data: str = "rows", method: str = "clora") -> Recipe:
    form = "completion" if data == "rows" else "chat, template: plain"
    path = made / f"{run.name}.yaml"
    path.write_text(
        f"""
base: {{model: {made / "base"}, quantization: none}}
adapter:
  {{method: {method}, rank: 4, targets: [q_proj, v_proj, down_proj], down: {{experts: 2}}, up: {{experts: 2}}}}
data:
  spans: [one, two]
  tasks: [{{name: said, path: {made / data}.jsonl, format: {form}, validation: 4}}]
  max_length: 64
train: {{steps: 4, micro_batch: 2, global_batch: 4, learning_rate: 1e-2, save_every: 2, eval_every: 2}}
output: {run}
""",
        encoding="utf-8",
    )
    return load_recipe(path, list(overrides))


def tensors(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def run(made: Path) -> Path:
    """Long enough that its two adapters say different things."""
    train(recipe(made, made / "run", "train.steps=40", "train.learning_rate=3e-2", "train.save_every=40"))
    return made / "run"


@pytest.fixture(scope="module")
def short(made: Path) -> Path:
    train(recipe(made, made / "short"))
    return made / "short"


@pytest.mark.parametrize("data", ["rows", "talks"])
def test_packed_rows_teach_what_padded_ones_do(data: str, made: Path, short: Path, tmp_path: Path) -> None:
    padded = short
    if data == "talks":
        padded = tmp_path / "padded"
        train(recipe(made, padded, data=data))
    train(recipe(made, tmp_path / "packed", "data.packing=true", data=data))
    ours, theirs = tensors(tmp_path / "packed"), tensors(padded)
    assert any(tensor.any() for name, tensor in theirs.items() if "mixture_B" in name)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-4)


def test_a_run_that_lost_its_end_goes_on_to_the_same_bits(made: Path, short: Path, tmp_path: Path) -> None:
    whole, settings = tensors(short), recipe(made, short)
    shutil.rmtree(short / "checkpoints" / "step-4")
    train(settings, resume=True)
    assert all(torch.equal(tensors(short)[name], tensor) for name, tensor in whole.items())


def test_what_stands_before_the_spans_is_the_bases_and_answers_are_scored(run: Path, made: Path) -> None:
    opened = open_run(run)
    (row,) = [one for one in _rows(opened)][:1]
    batch = collate([row], opened.tokenizer.pad_token_id)
    read_rows(opened.model, batch)
    told = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        ours = opened.model.base_model.model(**told).logits[0]
        with opened.model.disable_adapter():
            base = opened.model.base_model.model(**told).logits[0]
    first = min(start for _, start, _ in row.marks)
    assert first > 1 and torch.equal(ours[:first], base[:first]) and not torch.equal(ours[first:], base[first:])
    scores = evaluate(run, Exam(recipe=load_recipe(run / "recipe.yaml")))
    assert len(scores["said"].records) == 4


def _rows(opened: object) -> list:
    from qd2mora.data import prepare

    return list(prepare(opened.recipe.data, opened.tokenizer, 0)[0].train)


def test_a_prompt_is_asked_with_spans_and_without_any_is_the_bases(run: Path) -> None:
    def said(*spans: str, raw: bool = False) -> str:
        return generate(run, "Say red or blue: ", TalkOptions(max_new_tokens=6, spans=spans), raw=raw, say=lines.append)

    lines: list[str] = []
    plain = said()
    assert any("the answer is the base's own" in line for line in lines)
    assert plain == generate(
        run / ".." / "base", "Say red or blue: ", TalkOptions(max_new_tokens=6, template=None), raw=True
    )
    one, two = said("one=4:7", "one=answer"), said("two=4:7", "two=answer")
    assert one == said("one=4:7", "one=answer", raw=True)
    assert len({plain, one, two}) == 3
    assert said("two=10:") == said("two=10:17", "two=answer") != plain


@pytest.mark.parametrize(
    ("spans", "words"),
    [
        (("one",), "'one' will not do: ADAPTER=START:END"),
        (("six=1:2",), "no adapter 'six' in this run; there are one, two"),
        (("one=4:99",), "a span lies outside of its text: 4 to 99 of 17 letters"),
        (("one=4:7", "two=6:9"), "two spans overlap"),
        (("one=4:", "two=answer"), "both go on into the answer"),
        (("one=3:4",), "marks white space alone"),
    ],
)
def test_spans_of_a_prompt_that_will_not_do_are_refused(spans: tuple[str, ...], words: str, run: Path) -> None:
    with pytest.raises(InputRefused, match=words):
        generate(run, "Say red or blue: ", TalkOptions(spans=spans))


def test_what_cannot_mark_spans_is_refused_in_one_line(run: Path, made: Path, tmp_path: Path) -> None:
    for to in ("hf", "lora", "exact"):
        with pytest.raises(InputRefused, match="acts in marked spans alone, which an export"):
            merge(run, tmp_path / "out", ExportOptions(to=to))
    with pytest.raises(InputRefused, match="acts in marked spans alone, which nothing can mark here"):
        chat(run, ["hello"], print)
    with pytest.raises(InputRefused, match="--span: this model has no adapters"):
        generate(made / "base", "x", TalkOptions(spans=("one=0:1",)))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "x"}\n', encoding="utf-8")
    with pytest.raises(InputRefused, match="nothing can mark here"):
        generate_file(run, tmp_path / "prompts.jsonl", tmp_path / "o.jsonl", ManyOptions(TalkOptions()))
    assert not list(tmp_path.glob("o.jsonl*"))
    with ExitStack() as stack, pytest.raises(InputRefused, match="'run': this adapter acts in marked spans alone"):
        open_all(run, {}, None, stack)
    other = recipe(made, tmp_path / "other", "data.spans=[two,one]")
    with pytest.raises(InputRefused, match=r"but this run's adapters are \['one', 'two'\], in order"):
        evaluate(run, Exam(recipe=other))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.spans=null"], "clora acts in marked spans alone; name their adapters"),
        (["data.spans=[one,two,six]"], "3 names, and clora has 2 experts"),
        (["data.tasks.0.select={prompt: nothing}"], "no rows with"),
    ],
)
def test_a_recipe_without_marks_for_its_adapters_is_refused(
    overrides: list[str], words: str, made: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputRefused, match=words):
        train(recipe(made, tmp_path / "run", *overrides))
    assert not (tmp_path / "run").exists()


def test_rows_without_any_span_are_refused(made: Path, tmp_path: Path) -> None:
    row = json.dumps({"prompt": "Say red: ", "completion": "red"})
    (tmp_path / "bare.jsonl").write_text(f"{row}\n" * 8, encoding="utf-8")
    with pytest.raises(InputRefused, match="no row marks a span, and clora acts in no other place"):
        train(recipe(made, tmp_path / "run", f"data.tasks.0.path={tmp_path / 'bare.jsonl'}"))
