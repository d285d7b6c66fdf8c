"""The recipe of the real model, shortened: from its GGUF file to scores and an export that plain transformers reads.

Skipped where `python scripts/get_smollm2.py` has not got the model yet: a test downloads nothing.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from qd2mora.base import base_config, load_base
from qd2mora.cli import main
from qd2mora.evaluation import TalkOptions, generate
from qd2mora.recipe import Base

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "scripts"))
import get_smollm2  # type: ignore[import-not-found]  # noqa: E402

PROMPTS = [f"Name {what}." for what in ("a colour", "a bird", "a city", "a fruit", "a metal", "a river", "a planet")]
PROMPTS += [f"What is {a} plus {b}?" for a, b in ((1, 2), (4, 9), (12, 30), (7, 7), (100, 1), (3, 5))]
PROMPTS += [f"The opposite of {word} is" for word in ("hot", "up", "big", "old", "dark", "fast", "open")]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not get_smollm2.is_right(ROOT / "recipes" / "smollm2" / get_smollm2.MEMBER.rpartition("/")[2]):
        pytest.skip("python scripts/get_smollm2.py gets the model")
    run = tmp_path_factory.mktemp("smollm2") / "run"
    short = ["train.steps=2", "train.save_every=2", "train.warmup_steps=1", f"output={run}"]
    short += [f"data.tasks.{number}.{key}" for number in range(6) for key in ("validation=2", "limit=20")]
    command = [sys.executable, "-m", "qd2mora", "train", str(ROOT / "recipes" / "smollm2-135m.yaml"), *short]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return run


def test_the_run_ends_with_scores_of_base_adapter_and_export(run: Path) -> None:
    scores = json.loads((run / "scores.json").read_text(encoding="utf-8"))
    assert set(scores) == {"base", "adapter", "fp16 export"}
    assert all(len(tasks) == 6 for tasks in scores.values())


def test_the_exports_greedy_texts_are_plain_transformers_own(run: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(run / "export")
    model = AutoModelForCausalLM.from_pretrained(run / "export", dtype=torch.float32)
    assert len(PROMPTS) == 20
    for prompt in PROMPTS:
        ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
        ids = torch.tensor([ids["input_ids"] if not isinstance(ids, list) else ids])
        out = model.generate(ids, do_sample=False, max_new_tokens=8)[0, ids.shape[1] :]
        wanted = tokenizer.decode(out, skip_special_tokens=True)
        ours = generate(str(run / "export"), prompt, TalkOptions(max_new_tokens=8))
        assert ours.strip() == wanted.strip(), prompt


def test_the_file_is_the_model_that_the_folder_holds(run: Path, tmp_path: Path) -> None:
    file = get_smollm2.get(ROOT / "recipes" / "smollm2")
    whole = GgufConfig(dequantize=True)
    plain = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float16, quantization_config=whole
    )
    vars(plain.config).pop("quantization_config", None)  # it holds plain numbers now
    plain.save_pretrained(tmp_path)
    ids = torch.arange(100, 164)[None]
    found, wanted = (load_base(Base(model=str(each), quantization="none")) for each in (file, tmp_path))
    with torch.no_grad():
        one, other = found(ids).logits, wanted(ids).logits
    assert (one - other).norm() <= 1e-3 * other.norm()
    assert base_config(Base(model=str(file))).num_hidden_layers == 30


def test_quantising_the_file_takes_its_nf4_size_and_a_gibibyte_at_most(run: Path) -> None:
    file = get_smollm2.get(ROOT / "recipes" / "smollm2")
    code = f"""
from qd2mora.base import load_base
from qd2mora.base.host_memory import most_resident_bytes
from qd2mora.recipe import Base
model = load_base(Base(model={str(file)!r}))
size = sum(tensor.nbytes for tensor in model.parameters())
print(size, most_resident_bytes())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    size, peak = map(int, done.stdout.split())
    assert peak <= size + (1 << 30)


def test_the_models_chat_answers(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = get_smollm2.get(ROOT / "recipes" / "smollm2")
    command = ["generate", str(file), "--prompt", "What is the capital of France?", "--max-new-tokens", "12"]
    monkeypatch.setattr(sys, "argv", ["qd2mora", *command])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert "Paris" in capsys.readouterr().out
