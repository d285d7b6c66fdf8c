"""The exact export: the routed model itself, loaded by transformers alone where this package cannot be imported."""

import ast
import json
import sys
from pathlib import Path

import pytest
import tiny
import torch
from exported import adapted, make_run, without_this_package
from safetensors.torch import load_file, save_file

from qd2mora.base import load_base, load_tokenizer
from qd2mora.errors import InputRefused
from qd2mora.evaluation import TalkOptions, generate
from qd2mora.merging import ExportOptions, merge
from qd2mora.merging.base_weights import BaseWeights
from qd2mora.merging.exact import refuse_unfit, routed_parts, write_exact
from qd2mora.mixture import read_rows
from qd2mora.mixture.method import MLP
from qd2mora.mixture.presets import METHODS
from qd2mora.recipe import Base
from qd2mora.routed import modeling_mixture

GROWN: dict[str, dict[str, object]] = {
    "flexmore": {"rank": None, "ranks": [0, 4, 3, 5], "target_modules": list(MLP)},
    "mola": {"allocation": "2-3"},
    "smora": {"rank": 20},
}
GROWN |= {"flylora": {"rank": 20}, "mora": {"rank": 20}, "hydralora": {"shared": {"rank": 3, "init": "kaiming"}}}
GROWN |= {"noisy_top_k": {"target_modules": ["mlp"]}}
SMALL = {"dynmole": {"down": {"experts": 3}, "up": {"experts": 3}}}
MORE_GATES = {
    "entropy": {"gates": {"down": {"select": "entropy", "top_k": 1, "weight": "sigmoid"}, "up": {"temperature": 0.5}}},
    "prototype": {"gates": {"down": {"score": "prototype"}, "up": {"score": "bias", "select": "top_k", "top_k": 2}}},
    "noisy": {
        "gates": {
            "down": {"score": "noisy", "select": "top_k", "top_k": 1},
            "up": {"score": "mlp", "width": 5, "draws": 2},
        }
    },
    "shared_router": {"gates": {"down": {"scope": "block"}}},
    "sequence": {"gates": {"up": {"input": "x", "granularity": "sequence"}}},
    "task": {"num_tasks": 2, "task_embedding": 4, "gates": {"down": {"input": "task", "granularity": "task"}}},
    "fixed": {"num_tasks": 3, "gates": {"down": {"input": "task", "granularity": "task", "select": "fixed"}}},
    "none": {"gates": {"up": {"input": "none", "score": "static"}}},
}
ROUTED = sorted(name for name, row in METHODS.items() if row.gates.depends_on == "token" and name != "clora")
WHOLE_TEXT = ("base_gate", "sequence", "xlora")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = tiny.save_base(tmp_path_factory.mktemp("exact") / "base", tied=False)
    return Base(model=str(folder), quantization="none")


def cases() -> dict[str, tuple[str, dict[str, object]]]:
    plain = {name: (name, GROWN.get(name, {}) | SMALL.get(name, {})) for name in ROUTED}
    return plain | {name: ("d2mora", changes) for name, changes in MORE_GATES.items()}


@pytest.mark.parametrize("which", [0, *(pytest.param(rest, marks=pytest.mark.long) for rest in range(1, 6))])
def test_every_token_routed_method_gives_the_same_logits_elsewhere(which: int, base: Base, tmp_path: Path) -> None:
    """Every sixth case by default, the others in the long set."""
    ids = torch.randint(4, 500, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    labels = torch.where(torch.arange(9) < 5, -100, ids)
    wanted, tokenizer = {}, load_tokenizer(base.model)
    for case, (method, changes) in list(cases().items())[which::6]:
        model = adapted(base, method, **changes)
        read_rows(model, {"task_index": torch.tensor([1, 1])})
        source = BaseWeights(base)
        refuse_unfit(model, source)
        (tmp_path / case).mkdir()
        write_exact(routed_parts(model), source, tokenizer, tmp_path / case, dtype="float32", limit=100_000)
        with torch.no_grad():
            wanted[case] = model.base_model.model(input_ids=ids, use_cache=True).logits
            if case in WHOLE_TEXT:  # what is asked ends before the answer
                wanted[f"{case} asked"] = model(input_ids=ids, labels=labels).logits
        if case in WHOLE_TEXT:
            settings = {"attention_mask": mask, "max_new_tokens": 5, "num_beams": 3, "use_cache": case != "xlora"}
            wanted[f"{case} text"] = model.generate(input_ids=ids, **settings)
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    without_this_package(f"""
import pathlib, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = pathlib.Path({str(tmp_path)!r})
ids, found = load_file(folder / "ids.safetensors")["ids"], {{}}
for each in sorted(path for path in folder.iterdir() if path.is_dir()):
    model, said = AutoModelForCausalLM.from_pretrained(each, trust_remote_code=True, output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"] and not said["mismatched_keys"], said
    with torch.no_grad():
        found[each.name] = model(input_ids=ids).logits
        out = model.generate(ids[:1], max_new_tokens=5, do_sample=False)
        whole = model.generate(ids[:1], max_new_tokens=5, do_sample=False, use_cache=False)
    assert out.shape == (1, 14) and out.equal(whole), each.name
    if each.name in {WHOLE_TEXT!r}:
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        with torch.no_grad():
            labels = torch.where(torch.arange(9) < 5, -100, ids)
            found[each.name + " asked"] = model(input_ids=ids, labels=labels).logits
        out = model.generate(ids, attention_mask=mask, max_new_tokens=5, num_beams=3)
        found[each.name + " text"] = out.contiguous()
AutoTokenizer.from_pretrained(each)
save_file(found, folder / "found.safetensors")
assert "peft" not in sys.modules
""")
    found = load_file(tmp_path / "found.safetensors")
    assert found.keys() == wanted.keys() and len(found) >= 6
    plain = load_base(base)
    for case, logits in wanted.items():
        # float32, in another order of sums; texts are token numbers
        assert float((found[case] - logits).abs().max()) < 1e-4, case
    with torch.no_grad():
        assert (plain(input_ids=ids).logits - next(iter(wanted.values()))).abs().max() > 0.1


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run and its exact exports on a base in 16 bits and in four."""
    folder = tmp_path_factory.mktemp("exported")
    run = make_run(folder, "d2mora")
    merge(run, folder / "half", ExportOptions(to="exact", measured_rows=0))
    export = merge(run, folder / "nf4", ExportOptions(to="exact", dtype="nf4"))
    assert export.exact and export.fidelity is not None and export.fidelity.kl_per_token == 0
    return folder


@pytest.fixture(scope="module")
def elsewhere(exported: Path) -> dict[str, str]:
    """What a process without this package finds in the exports."""
    said = without_this_package(f"""
import json
from transformers import AutoModelForCausalLM, AutoTokenizer
half, nf4 = {str(exported / "half")!r}, {str(exported / "nf4")!r}
try:
    AutoModelForCausalLM.from_pretrained(half, trust_remote_code=False)
    untrusted = "loaded"
except ValueError as error:
    untrusted = "refused"
linear = AutoModelForCausalLM.from_pretrained(half, trust_remote_code=True).model.layers[1].mlp.down_proj
dtypes = [linear.base_layer.weight.dtype, linear.mixture.down.dtype, linear.mixture.router_up.dtype]
model = AutoModelForCausalLM.from_pretrained(nf4, trust_remote_code=True)
packed = model.model.layers[0].self_attn.q_proj.base_layer.weight.dtype
tokenizer = AutoTokenizer.from_pretrained(nf4)
ids = tokenizer("red sun", return_tensors="pt")
out = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1]:]
text = tokenizer.decode(out, skip_special_tokens=True)
print()  # ends the line in which transformers asks about the tokenizer
print(json.dumps(dict(untrusted=untrusted, dtypes=" ".join(map(str, dtypes)), packed=str(packed), text=text)))""")
    found: dict[str, str] = json.loads(said.strip().splitlines()[-1])
    return found


def test_the_four_bit_weights_go_along_bit_for_bit(exported: Path, elsewhere: dict[str, str]) -> None:
    assert elsewhere["packed"] == "torch.uint8"
    (run,) = exported.glob("run-*")
    assert elsewhere["text"] == generate(run, "red sun", TalkOptions(max_new_tokens=8), raw=True)


def test_the_adapter_stays_in_float32_on_a_base_in_16_bits(elsewhere: dict[str, str]) -> None:
    assert elsewhere["dtypes"].split() == ["torch.float16", "torch.float32", "torch.float32"]


VECTOR = "gates: {down: {input: external, granularity: sequence}}, external_width: 3,"


@pytest.mark.parametrize(
    ("method", "more", "words"),
    [("lora", "", "exact already"), ("dora", "", "exact already"), ("d2mora", VECTOR, "a vector of the row")],
)
def test_what_the_code_file_does_not_run_is_refused_before_anything_is_written(
    method: str, more: str, words: str, tmp_path: Path
) -> None:
    run = make_run(tmp_path, method, adapter=more)
    with pytest.raises(InputRefused, match=words):
        merge(run, tmp_path / "out", ExportOptions(to="exact"))
    assert not (tmp_path / "out").exists()


def test_without_trust_the_folder_is_refused_and_never_the_plain_base(elsewhere: dict[str, str]) -> None:
    assert elsewhere["untrusted"] == "refused"


def test_the_code_files_are_the_packages_own_and_import_nothing_but_torch_and_each_other(exported: Path) -> None:
    home = Path(modeling_mixture.__file__).parent
    assert {path.name for path in (exported / "half").glob("*.py")} == set(modeling_mixture.FILES)
    for name in modeling_mixture.FILES:
        assert (exported / "half" / name).read_bytes() == (home / name).read_bytes()
        for node in ast.walk(ast.parse((home / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert f"{node.module}.py" in modeling_mixture.FILES
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names]
                parts = {str(each).partition(".")[0] for each in names}
                assert parts <= {"torch", "transformers"} | sys.stdlib_module_names
