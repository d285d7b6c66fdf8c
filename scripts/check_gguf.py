"""Does a GGUF file say in llama.cpp what the model says in transformers? Tokens, logits, greedy texts, chat template.

How: `pip install llama-cpp-python` (builds from source), then `python scripts/check_gguf.py SUBJECT... --out FILE`. A
subject is a run, exported by `core_lsq`, the folder of a model, or `family:NAME`, the tests' tiny random model of a
family (`families` for all of them). The reference is the `hf` export of the same static updates (the folder itself), in
float32 on what float16 holds; the KV cache is float32 there as here. A run's LoRA is put on the base's GGUF too, as
`gguf_lora` writes it, and with `--converter convert_lora_to_gguf.py` (of llama.cpp, it needs its own folder beside it)
as llama.cpp makes it of the `lora` export.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from bench_parts import context
from llama_cpp import Llama, __version__
from peft import PeftModel
from transformers import AutoModelForCausalLM

from qd2mora.base import load_base, load_tokenizer
from qd2mora.data.chat import TEMPLATES
from qd2mora.errors import InputRefused
from qd2mora.merging import make_static
from qd2mora.merging.base_weights import BaseWeights
from qd2mora.merging.gguf_file import write_gguf
from qd2mora.merging.gguf_vocab import vocabulary_of
from qd2mora.merging.rung import ExportForm
from qd2mora.merging.rungs import export_form, open_weights
from qd2mora.merging.sample import sample_rows
from qd2mora.merging.static_updates import Statics
from qd2mora.recipe import Base
from qd2mora.run_folder import is_run, open_run

TEXTS = ("Once upon a time there was a little girl", "zé 日", "two  spaces", " It's 1234.5!", "One day,\nTom", "")
PROMPTS = 8
FAMILY = "family:"
FEW_BITS = "q4_k_m"
FLOAT32 = 0
"""ggml's number for it."""


def export(subject: str, folder: Path) -> list[str]:
    """Write the exports of a subject, one in each subfolder; return prompts to continue."""
    if not is_run(subject):
        base = Base(model=str(Path(subject).resolve()), quantization="none")
        tokenizer = with_template(load_tokenizer(base.model))
        for dtype in ("float16", "q8_0"):
            (folder / dtype).mkdir()
            known = is_known(tokenizer, BaseWeights(base).config.vocab_size)
            where = folder / dtype
            write_gguf(BaseWeights(base), tokenizer, {}, where, name="model", dtype=dtype, with_vocabulary=known)
        (folder / "hf").symlink_to(base.model)
        return [
            "Once upon a time",
            "One day, Tom",
            "The little dog",
            "Lily and her mom",
            '"I am',
            "A big",
            "He",
            "Then",
        ]
    opened = open_run(subject)
    with_template(opened.tokenizer)
    vocabulary = is_known(opened.tokenizer, opened.model.config.vocab_size)

    def write(form: ExportForm, statics: Statics, place: Path) -> None:
        form.rung.prepare(opened, open_weights(opened, form), statics, form)(place)

    made = make_static(opened, "core_lsq")
    forms = {"hf": export_form("hf"), "lora": export_form("lora"), "gguf_lora": export_form("gguf_lora")}
    forms |= {
        dtype: export_form("gguf", dtype=dtype, with_vocabulary=vocabulary) for dtype in ("float16", "q8_0", FEW_BITS)
    }
    for name, form in forms.items():
        (folder / name).mkdir()
        write(form, made.statics, folder / name)
    for name, to in {"base": "gguf", "base_hf": "hf"}.items():
        (folder / name).mkdir()
        form = export_form(to, with_vocabulary=vocabulary or to != "gguf")
        write(form, {}, folder / name)
    held_out = sample_rows(opened, None).held_out
    step = max(1, len(held_out) // PROMPTS)
    return [row.pair.prompt for row in held_out[::step][:PROMPTS]]


def is_known(tokenizer: Any, rows: int) -> bool:
    """Tell whether llama.cpp can rebuild a tokenizer; where not, its files take token ids alone."""
    try:
        vocabulary_of(tokenizer, rows)
    except InputRefused as error:
        print(f"no vocabulary: {error}")
        return False
    return True


def with_template(tokenizer: Any) -> Any:
    """Return the tokenizer with a chat template, so that there is one to compare."""
    tokenizer.chat_template = tokenizer.chat_template or TEMPLATES["chatml"]
    return tokenizer


def compare(theirs: Any, tokenizer: Any, file: Path, prompts: list[str], new: int, lora: Path | None) -> dict[str, Any]:
    """Compare a file in llama.cpp with a transformers model of the same weights."""
    ours = Llama(
        str(file),
        n_ctx=512,
        logits_all=True,
        verbose=False,
        n_threads=torch.get_num_threads(),
        type_k=FLOAT32,
        type_v=FLOAT32,
        lora_path=None if lora is None else str(lora),
    )
    differences, same, agreed = [], 0, 0
    for prompt in prompts:
        ids = tokenizer(prompt)["input_ids"]
        given = torch.tensor([ids])
        with torch.no_grad():
            wanted = theirs(input_ids=given).logits[0]
            settings = {"max_new_tokens": new, "do_sample": False, "use_cache": True}
            text = theirs.generate(input_ids=given, attention_mask=torch.ones_like(given), **settings)[0, len(ids) :]
        ours.reset()
        ours.eval(ids)
        found = torch.from_numpy(np.array(ours.scores[: len(ids)]))
        differences.append(float((found - wanted).norm() / wanted.norm()))
        mine = greedy(ours, len(text), tokenizer.eos_token_id)
        same += mine == text.tolist()
        agreed += sum(a == b for a, b in zip(mine, text.tolist(), strict=False))
    return {
        "bytes": file.stat().st_size + (0 if lora is None else lora.stat().st_size),
        "relative_difference_of_logits": max(differences),
        "same_greedy_texts": f"{same} of {len(prompts)}",
        "new_tokens": new,
    } | (texts_of(ours, tokenizer, prompts) if ours.metadata["tokenizer.ggml.model"] != "none" else {})


def texts_of(ours: Llama, tokenizer: Any, prompts: list[str]) -> dict[str, Any]:
    """Compare what the file's own tokenizer makes of texts."""
    return {
        "same_tokens": all(
            ours.tokenize(text.encode(), special=True) == tokenizer(text)["input_ids"] for text in (*TEXTS, *prompts)
        ),
        "same_chat_template": ours.metadata.get("tokenizer.chat_template") == tokenizer.chat_template,
    }


def greedy(ours: Llama, most: int, end: int | None) -> list[int]:
    """Continue what was evaluated by the likeliest tokens."""
    tokens: list[int] = []
    while len(tokens) < most and (not tokens or tokens[-1] != end):
        tokens.append(int(np.argmax(ours.scores[ours.n_tokens - 1])))
        ours.eval(tokens[-1:])
    return tokens


def family_folder(name: str, place: Path) -> str:
    """Save the tests' random model of a family, its window as long as what is read here; return the folder."""
    models = _families()
    if hasattr(models.FAMILIES[name], "sliding_window") and not name.startswith("gemma"):
        # A Mistral's or a Phi's file ends with its window, which llama.cpp leaves out; a Gemma's are among its layers.
        models.FAMILIES[name].sliding_window = models.FAMILIES[name].max_position_embeddings
    return str(models.save_family(name, place / name))


def _families() -> Any:
    tests = Path(__file__).resolve().parents[1] / "tests"
    sys.path[:0] = [str(tests), str(tests / "families")]
    return importlib.import_module("family_models")


def check(subject: str, converter: str | None, new: int) -> dict[str, Any]:
    """Return all comparisons of one subject."""
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        if subject.startswith(FAMILY):
            subject = family_folder(subject.removeprefix(FAMILY), folder)
        prompts = export(subject, folder)
        tokenizer = with_template(load_tokenizer(str(folder / "hf")))
        model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
        results = {
            dtype: compare(model, tokenizer, only(folder / dtype), prompts, new, None) for dtype in ("float16", "q8_0")
        }
        if (folder / FEW_BITS).is_dir():
            # What llama.cpp makes of a file of few bits, against its own weights dequantised.
            read = load_base(Base(model=str(only(folder / FEW_BITS)), quantization="none", compute_dtype="float32"))
            results[FEW_BITS] = compare(read, tokenizer, only(folder / FEW_BITS), prompts, new, None)
        if (folder / "gguf_lora").is_dir():
            base = AutoModelForCausalLM.from_pretrained(folder / "base_hf", dtype=torch.float32)
            adapted = PeftModel.from_pretrained(base, str(folder / "lora"))
            loras = {"gguf_lora": only(folder / "gguf_lora")}
            if converter is not None:
                loras["llama.cpp's converter of lora"] = converted(converter, folder)
            for name, lora in loras.items():
                results[name] = compare(adapted, tokenizer, only(folder / "base"), prompts, new, lora)
            if converter is not None:
                first, second = (tensors(path) for path in loras.values())
                same = first.keys() == second.keys() and all(
                    np.array_equal(first[name], second[name]) for name in first
                )
                results["gguf_lora"]["same_tensors_as_llama.cpp's_converter"] = same
        return results


def converted(converter: str, folder: Path) -> Path:
    """Return what llama.cpp's converter makes of the `lora` export."""
    out = folder / "converted.gguf"
    command = [sys.executable, converter, "--base", str(folder / "base_hf"), "--outfile", str(out), "--outtype", "f32"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, str(folder / "lora")], capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return out


def tensors(path: Path) -> dict[str, Any]:
    """Return a file's tensors by name."""
    return {each.name: np.array(each.data) for each in gguf.GGUFReader(path).tensors}


def only(folder: Path) -> Path:
    """Return the one GGUF file of a folder."""
    (path,) = folder.glob("*.gguf")
    return path


def main() -> None:
    """Print one line for each comparison; write all of them to --out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("subjects", nargs="+", help="runs, or folders of models")
    parser.add_argument("--converter", help="llama.cpp's convert_lora_to_gguf.py")
    parser.add_argument("--new-tokens", type=int, default=40)
    parser.add_argument("--out", help="JSON file")
    given = parser.parse_args()
    found: dict[str, Any] = {}
    subjects = given.subjects
    if "families" in subjects:
        named = [FAMILY + name for name in _families().FAMILIES]
        subjects = [*named, *(subject for subject in subjects if subject != "families")]
    for subject in subjects:
        name = subject if subject.startswith(FAMILY) else Path(subject).resolve().name
        found[name] = check(subject, given.converter, given.new_tokens)
        for form, result in found[name].items():
            print(f"{name} {form}: " + ", ".join(f"{key} {value}" for key, value in result.items()), flush=True)
    about = context(torch.device("cpu"), {"new_tokens": given.new_tokens})
    about["versions"] |= {"llama_cpp_python": __version__}
    about["command"] = "python scripts/check_gguf.py " + " ".join(Path(subject).name for subject in given.subjects)
    if given.out is not None:
        Path(given.out).write_text(json.dumps(about | {"results": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
