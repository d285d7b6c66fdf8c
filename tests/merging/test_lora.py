"""The LoRA export: stock PEFT loads it, it is the merged folder to rounding, and other tools find their names in it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import make_run, without_this_package
from safetensors.torch import load_file

from qd2mora.errors import InputRefused, NotFinite
from qd2mora.merging import ExportOptions, merge
from qd2mora.merging.lora import targets_of, write_lora
from qd2mora.mixture.low_rank import LowRank


def test_stock_peft_gives_the_logits_of_the_merged_folder(tmp_path: Path) -> None:
    runs = {"d2mora": make_run(tmp_path, "d2mora", quantization="none"), "moelora": make_run(tmp_path, "moelora")}
    # Any strategy will do: two forms of one static update are compared.
    merge(runs["d2mora"], tmp_path / "d2mora-lora", ExportOptions(to="lora", strategy="core_lsq"))
    merge(runs["d2mora"], tmp_path / "d2mora-hf", ExportOptions(dtype="float32", strategy="core_lsq"))
    for task in ("first", "last"):
        merge(runs["moelora"], tmp_path / f"{task}-lora", ExportOptions(to="lora", task=task))
        merge(runs["moelora"], tmp_path / f"{task}-hf", ExportOptions(task=task, base="original", dtype="float32"))
    said = without_this_package(f"""
import pathlib, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
folder = pathlib.Path({str(tmp_path)!r})
ids, outs = torch.arange(4, 24).view(2, 10), []
for name in ("d2mora", "first", "last"):
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    with torch.no_grad():
        plain = base(input_ids=ids).logits
        model = PeftModel.from_pretrained(base, folder / (name + "-lora"))
        ours = model(input_ids=ids).logits
        merged = AutoModelForCausalLM.from_pretrained(folder / (name + "-hf"))(input_ids=ids).logits
        folded = model.merge_and_unload()(input_ids=ids).logits
    outs.append(ours)
    print(float((ours - merged).abs().max()), float((folded - merged).abs().max()), float((ours - plain).abs().max()))
print(float((outs[1] - outs[2]).abs().max()))""")
    *lines, tasks = said.splitlines()[-4:]
    for line in lines:
        ours, folded, moved = map(float, line.split())
        assert ours < 1e-4 and folded < 1e-4 and moved > 0.05  # float32, in another order
    assert float(tasks) > 0.01


def test_names_and_shapes_are_those_that_converters_look_for(tmp_path: Path) -> None:
    export = merge(make_run(tmp_path, "d2mora"), tmp_path / "out", ExportOptions(to="lora", dtype="float16"))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    pattern = r"base_model\.model\.model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj\.lora_([AB])\.weight"
    found = {name: re.fullmatch(pattern, name) for name in tensors}
    assert len(tensors) == 12 and all(found.values())
    for name, match in found.items():
        assert match is not None and tensors[name].shape[match[2] == "B"] == config["r"]
        assert tensors[name].dtype == torch.float16
    # M r + M features of 4 down experts, or N r of 3 up experts: whichever is narrower.
    assert config["r"] == config["lora_alpha"] == 12
    assert config["target_modules"] == ["down_proj", "q_proj", "v_proj"] and config["peft_type"] == "LORA"
    # vLLM refuses anything but plain A and B; llama.cpp's converter looks for the base by its name.
    assert config["bias"] == "none" and config["base_model_name_or_path"] == str(tmp_path / "base")
    assert not any(config.get(key) for key in ("modules_to_save", "use_dora", "use_rslora", "rank_pattern"))
    assert export.form.dtype == "float16" and export.written.num_bytes > 0


def test_targets_are_short_names_where_those_pick_nothing_else() -> None:
    linears = ["a.0.q", "a.0.v", "a.1.q", "a.1.v"]
    assert targets_of(["a.0.q", "a.1.q"], linears) == ["q"]
    assert targets_of(["a.0.q"], linears) == ["a.0.q"]


def test_updates_of_several_ranks_and_scales_become_one_rank(tmp_path: Path) -> None:
    torch.manual_seed(0)
    statics = {name: LowRank(torch.randn(q, 6), torch.randn(5, q), s) for name, q, s in (("a", 2, 0.5), ("b", 4, 3.0))}
    write_lora(statics, "base", ["a", "b"], tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for name, static in statics.items():
        down, up = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        assert down.shape == (4, 6) and up.shape == (5, 4)
        torch.testing.assert_close(up @ down, static.dense())


def test_what_no_lora_can_carry_is_refused(tmp_path: Path) -> None:
    static = LowRank(torch.ones(2, 3), torch.ones(3, 2), 1.0)
    with pytest.raises(InputRefused, match="scales its base"):
        write_lora({"a": LowRank(static.down, static.up, 1.0, 0.1)}, "base", ["a"], tmp_path)
    with pytest.raises(InputRefused, match="--to hf"):
        write_lora({}, "base", ["a"], tmp_path)
    with pytest.raises(NotFinite, match=r"^a: .*--dtype float32"):
        write_lora({"a": LowRank(static.down, 1e5 * static.up, 1.0)}, "base", ["a"], tmp_path, dtype=torch.float16)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"to": "loar"}, "--to: unknown 'loar'; did you mean 'lora'"),
        ({"base": "orignal"}, "did you mean 'original'"),
        ({"dtype": "nf4"}, "--dtype: 'nf4' will not do for --to hf; there are float16, bfloat16"),
        ({"to": "lora", "base": "original"}, "a LoRA holds no base"),
        ({"to": "exact", "base": "original"}, "saw the dequantized base"),
        ({"max_shard": "lots"}, "--max-shard: 'lots'"),
        ({"max_shard": "1GB", "to": "gguf"}, "--max-shard: --to gguf writes one file of weights; it goes with --to hf"),
        ({"with_vocabulary": False}, "--no-vocabulary: --to hf keeps the tokenizer"),
    ],
)
def test_a_form_that_will_not_do_is_refused_before_the_run_is_opened(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(InputRefused, match=re.escape(words)):
        merge(tmp_path / "no-run", tmp_path / "out", ExportOptions(**changes))
