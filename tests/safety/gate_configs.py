"""CF1: configurations of adapters, bases and tokenizers that no library wrote, put together from structured parts.

Each is taken, or refused in one line with a code of ours, within a limit and 1 GiB, and nothing is imported or fetched
for it. The limit is of processor time, and far from what any case takes (6 s on a busy machine): what it excludes are
the minutes of a pattern that backtracks or of a size that is believed.
"""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import gate_finite
from forked import Outcome, Result, command, run

LIMIT_S, LIMIT_MIB = 30.0, 1024.0
SEED = 16

BIG = "a" * 100_000
_NAMES = [["q_proj"], ["q_proj"] * 50_000, ["lm_head"], [1], [], "(a+)+$", ["model"], ["embed_tokens"], [BIG], [["x"]]]
_DEEP: dict[str, Any] = {}
for _ in range(400):
    _DEEP = {"x": _DEEP}
ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 7, 4.5, 1e300, -1e300, 5e-324, float("nan"), float("inf"), 2**31, 2**63, 10**30),
    *("", "x", "nan", BIG, "../../x", "/etc/passwd", "os.system", "\u202e", [], [[]], [0] * 20_000, {}, _DEEP),
    *({"a": 1}, {"_target_": "os.system"}, {str(number): "x" for number in range(20_000)}, [None], ["x"]),
]
_LORA_KEYS: dict[str, list[Any]] = {
    "r": [10**9, 2**20, 5, 1],
    "lora_alpha": [1e30, 1e-30],
    "rank_pattern": [{"q_proj": 10**9}, {"q_proj": 2}, {"((a+)+)+Z": 4}, {f"x{number}": 1 for number in range(5_000)}],
    "alpha_pattern": [{"((([a-z._0-9]+)+)+)+Z": 4}, {"q_proj": float("nan")}, {"q_proj": "8"}],
    "layer_replication": [[[0, 1]] * 200_000, [[0, 2], [0, 2]]],
    "init_lora_weights": ["pissa_niter_1000000000", "pissa", "olora", "loftq", "corda", "gaussian", "zz"],
    "trainable_token_indices": [[10**12], [1, 2], {"embed_tokens": [-5]}, list(range(100_000))],
    "megatron_config": [{"a": 1}],
    "megatron_core": ["megatron.core", "os.path", "canary_module"],
    "auto_mapping": [{"base_model_class": "X", "parent_library": "canary_module"}],
    "layers_to_transform": [[10**9], [0], 0, -1],
    "layers_pattern": ["layers", "(a+)+$", ["layers"]],
    "loftq_config": [{"loftq_bits": 10**9}],
    "eva_config": [{"rho": -1}],
    **{key: [{"a": 1}] for key in ("corda_config", "arrow_config", "runtime_config", "kasa_config", "lora_ga_config")},
    **{key: _NAMES for key in ("target_modules", "exclude_modules", "modules_to_save", "target_parameters")},
    **{
        key: []
        for key in ("use_dora", "use_rslora", "use_qalora", "lora_bias", "bias", "fan_in_fan_out", "lora_dropout")
    },
    **{
        key: []
        for key in ("task_type", "peft_type", "revision", "base_model_name_or_path", "inference_mode", "unknown")
    },
}
_MIXTURE_KEYS: dict[str, list[Any]] = {
    **{key: [10**9, 2**20, 3] for key in ("rank", "attention_rank", "num_tasks", "task_embedding", "external_width")},
    **{
        key: [{"experts": 10**9}, {"experts": 4000}, {"experts": 0}, {"experts": 2.5}, {"x": 1}]
        for key in ("down", "up", "core")
    },
    "experts": ["dora", "lora", 1],
    "ranks": [[10**9, 4], [4, 4, 4], [4] * 5_000, ["4"]],
    "gates": [
        {"down": {"select": "zz"}},
        {"down": {"top_k": 10**9}},
        {"x": {}},
        {"down": {"score": "mlp", "draws": 10**9}},
        *({"down": {"width": 2**20}}, {"down": {"score": "mlp", "width": 10**7}}),
        {"down": 5},
    ],
    "shared": [{"rank": 10**9}, {"rank": 4, "init": "pissa"}, {"rank": 0}, {"rank": "x"}],
    "penalties": [{"zz": 1}, {"orthogonality": float("nan")}],
    "allocation": ["2-99999999999", "4000", "9" * 400, "2-4", "0", "-".join(["1"] * 10_000)],
    "method": ["loramoe", "lora", "dora", "mola", "task", "zz", "flylora", "smora", "mixlora"],
    "target_modules": _NAMES,
    **{key: [] for key in ("alpha", "dropout", "init", "train_experts", "rank_stabilized", "task_type", "peft_type")},
}
_BASE_KEYS: dict[str, list[Any]] = {
    **{key: [2**16, 10**6, 2**60, 3] for key in ("hidden_size", "intermediate_size", "vocab_size", "head_dim")},
    **{key: [10**6, 256, 128, 3, 0] for key in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")},
    "max_position_embeddings": [2**62, 2**26, 1],
    "num_labels": [10**8],
    "id2label": [{str(number): "x" for number in range(100_000)}],
    "rope_parameters": [
        *({"rope_type": "zz"}, {"rope_type": "dynamic", "factor": "x"}, {"rope_type": "yarn"}, {"rope_theta": 0}),
        *(
            {"rope_type": "llama3", "rope_theta": 1e4, "factor": 1e9},
            {"rope_type": "longrope", "short_factor": [1] * 9},
        ),
    ],
    "rope_scaling": [{"type": "linear", "factor": -1}, {"type": "zz"}],
    "hidden_act": ["os.system", "gelu", ["silu"]],
    "model_type": ["gpt2", "t5", "mamba", "mixtral", "clip", ["llama"], "canary_module"],
    "quantization_config": [
        *({"load_in_4bit": True}, {"quant_method": "bitsandbytes"}, {"quant_method": "gptq", "bits": 4}, [1]),
        *(
            {"quant_method": "bitsandbytes", "load_in_8bit": True},
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
        ),
        {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "fp4",
            "bnb_4bit_compute_dtype": "zz",
        },
    ],
    "layer_types": [["x"] * 2, ["full_attention"] * 100_000, ["sliding_attention"] * 2],
    "text_config": [{"model_type": "llama"}],
    **{key: [10**9, -5, [1, 2]] for key in ("pad_token_id", "bos_token_id", "eos_token_id")},
    **{
        key: []
        for key in ("auto_map", "trust_remote_code", "dtype", "torch_dtype", "attn_implementation", "architectures")
    },
    **{
        key: []
        for key in ("rms_norm_eps", "rope_theta", "attention_bias", "mlp_bias", "tie_word_embeddings", "use_cache")
    },
    **{
        key: []
        for key in ("pretraining_tp", "initializer_range", "attention_dropout", "transformers_version", "pruned_heads")
    },
}
_GENERATION_KEYS: dict[str, list[Any]] = {
    "eos_token_id": [[1, "x"], [10**20], list(range(5_000))],
    **{key: [] for key in ("max_new_tokens", "do_sample", "temperature", "top_p", "stop_strings", "pad_token_id")},
    **{key: [] for key in ("num_beams", "max_length", "repetition_penalty", "suppress_tokens", "cache_implementation")},
}
_TOKENIZER_CONFIG_KEYS: dict[str, list[Any]] = {
    "additional_special_tokens": [[f"<a{number}>" for number in range(100_000)], ["<a>"] * 100, [BIG]],
    "extra_special_tokens": [["<x>"], {"a": "<b>"}],
    "added_tokens_decoder": [{str(10**12): {"content": "x"}}, {"5": {"content": "x", "special": True}}, {"x": 1}],
    "chat_template": [
        "{% for a in range(10**9) %}{% endfor %}",
        "{{ raise_exception('x') }}",
        "{{ 'x' * 10**9 }}",
        "{{",
        BIG,
    ],
    **{key: [] for key in ("eos_token", "bos_token", "unk_token", "pad_token", "model_max_length", "tokenizer_class")},
    **{key: [] for key in ("padding_side", "clean_up_tokenization_spaces", "auto_map", "add_bos_token", "vocab_file")},
}


def _split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


_TOKENIZER_KEYS: dict[str, list[Any]] = {
    "normalizer": [
        {"type": "Sequence", "normalizers": [_replace({"String": "a"}, "a" * 100_000)] * 2},
        {"type": "Sequence", "normalizers": [_replace({"String": "a"}, "aa")] * 40},
        *(_replace({"Regex": "(a*)*$"}, "b"), {"type": "Prepend", "prepend": BIG}, {"type": "zz"}, {"type": "NFC"}),
    ],
    "pre_tokenizer": [
        *map(
            _split,
            ("(a+)+$", "(([a-z ]+)+)+Z", "(a|a)*b", "((a{1,9}){1,9}){1,9}", "(", "(?:x*)*", r"\p{L}+|\s+", "(?R)"),
        ),
        {"type": "Sequence", "pretokenizers": [_split("(.*)*Z")] * 3},
        {"type": "ByteLevel", "add_prefix_space": "x"},
    ],
    "model": [
        {"type": "BPE"},
        {"type": "Unigram", "vocab": []},
        {"type": "WordLevel", "vocab": {"a": -1}, "unk_token": "a"},
    ],
    "added_tokens": [
        [{"id": 10**9, "content": "q"}],
        [{"id": number, "content": f"t{number}"} for number in range(30_000)],
    ],
    "decoder": [_replace({"String": "e"}, "e" * 10**6), {"type": "zz"}],
    "post_processor": [{"type": "zz"}, {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}],
    "truncation": [{"max_length": 0, "strategy": "LongestFirst", "stride": 5, "direction": "Right"}],
    "padding": [{"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}],
}
FILES: dict[str, tuple[dict[str, list[Any]], tuple[str, ...]]] = {
    "lora/adapter_config.json": (_LORA_KEYS, ("generate lora", "upcycle")),
    "pairs/adapter_config.json": (_MIXTURE_KEYS, ("generate pairs", "sub")),
    "run/adapter/adapter_config.json": (_MIXTURE_KEYS, ("generate run",)),
    "base/config.json": (_BASE_KEYS, ("plan", "generate base", "generate lora")),
    "base/generation_config.json": (_GENERATION_KEYS, ("generate base",)),
    "base/tokenizer_config.json": (_TOKENIZER_CONFIG_KEYS, ("preview", "generate base")),
    "base/tokenizer.json": (_TOKENIZER_KEYS, ("preview", "generate base")),
}
_COMOL: dict[str, Any] = {"method": "comol", "down": {"experts": 1}, "up": {"experts": 1}}
TELLING: list[tuple[str, str, dict[str, Any]]] = [
    ("lora/adapter_config.json", "generate lora", {"alpha_pattern": {"((([a-z._0-9]+)+)+)+Z": 4}}),
    ("lora/adapter_config.json", "generate lora", {"init_lora_weights": "pissa_niter_1000000000"}),
    ("lora/adapter_config.json", "generate lora", {"layer_replication": [[0, 1]] * 200_000}),
    ("lora/adapter_config.json", "generate lora", {"r": 2**20}),
    ("lora/adapter_config.json", "generate lora", {"modules_to_save": ["embed_tokens"]}),
    ("lora/adapter_config.json", "upcycle", {"r": 2}),
    ("lora/adapter_config.json", "upcycle", {"r": None}),
    ("pairs/adapter_config.json", "generate pairs", {"down": {"experts": 4000}, "up": {"experts": 4000}}),
    ("pairs/adapter_config.json", "generate pairs", _COMOL | {"core": {"experts": 2 * 10**7}}),
    ("pairs/adapter_config.json", "generate pairs", {"ranks": [120] * 4096, "down": None, "up": None}),
    ("pairs/adapter_config.json", "generate pairs", {"gates": {"down": {"score": "mlp", "width": 2 * 10**6}}}),
    ("pairs/adapter_config.json", "generate pairs", {"method": "mixlora", "attention_rank": 2**20}),
    ("pairs/adapter_config.json", "generate pairs", {"allocation": "4000", "down": None, "up": None}),
    ("base/config.json", "plan", {"num_hidden_layers": 10**6}),
    ("base/config.json", "plan", {"id2label": {str(number): "x" for number in range(100_000)}}),
    ("base/config.json", "plan", {"rope_parameters": {"rope_type": "zz"}}),
    ("base/tokenizer_config.json", "preview", {"additional_special_tokens": [f"<a{one}>" for one in range(100_000)]}),
    ("base/tokenizer.json", "preview", {"normalizer": _TOKENIZER_KEYS["normalizer"][0]}),
    ("base/tokenizer.json", "preview", {"pre_tokenizer": _split("(([a-z ]+)+)+Z")}),
    ("base/tokenizer.json", "preview", {"model": {"type": "BPE"}}),
    ("base/tokenizer_config.json", "preview", {"unk_token": ""}),
    ("base/generation_config.json", "generate base", {"num_beams": 4, "stop_strings": [], "eos_token_id": [None]}),
    ("base/generation_config.json", "generate base", {"eos_token_id": [[]]}),
    ("base/generation_config.json", "generate base", {"cache_implementation": "a" * 100_000}),
    ("base/config.json", "generate lora", {"intermediate_size": 1_000_000}),
    ("base/config.json", "plan", {"num_hidden_layers": 256}),
    ("base/config.json", "generate base", {"layer_types": ["sliding_attention"] * 2}),
    ("base/config.json", "generate base", {"rope_parameters": "a" * 100_000}),
    ("base/tokenizer.json", "preview", {"padding": "a" * 100_000}),
    ("base/tokenizer_config.json", "preview", {"padding_side": [0] * 1000}),
]
"""What once gave a traceback, an abort or no end, asked in every size."""


def gate(made: Path, folder: Path, number: int) -> Result:
    """Ask verbs about `number` configurations, one or two odd fields each, the same for every run of the gate."""
    result = Result("CF1")
    whole = gate_finite.made_whole(made, folder / "whole")
    order = random.Random(SEED)
    cases = [*TELLING, *(_drawn(order) for _ in range(number))]
    for file, verb, changes in cases:
        case = folder / "case"
        shutil.rmtree(case, ignore_errors=True)
        shutil.copytree(whole, case)
        gate_finite.name_own_folders(case, whole)
        path = case / file
        path.parent.mkdir(exist_ok=True)
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        path.write_text(json.dumps(content | changes), encoding="utf-8")
        gate_finite.sealed_anew(path.parent)
        outcome = run(command(*_arguments(verb, case)), marker="canary_module", limit_s=10 * LIMIT_S)
        result.check(_is_answered(outcome), f"{verb}, {file} {str(changes)[:150]}: {str(outcome)[-220:]}")
        seconds, grown = result.numbers.get("longest_s", 0.0), result.numbers.get("most_mib", 0.0)
        result.numbers |= {
            "longest_s": round(max(seconds, outcome.seconds), 1),
            "most_mib": round(max(grown, outcome.grown_mib)),
        }
    return result


def _drawn(order: random.Random) -> tuple[str, str, dict[str, Any]]:
    file = order.choice(list(FILES))
    keys, verbs = FILES[file]
    changes = {}
    for key in order.sample(list(keys), order.choice((1, 1, 1, 2))):
        changes[key] = order.choice(keys[key] if keys[key] and order.random() < 0.6 else ODD)
    return file, order.choice(verbs), changes


def _arguments(verb: str, case: Path) -> list[str]:
    verb, _, asked = verb.partition(" ")
    if verb == "generate":
        return [verb, str(case / asked), "--prompt", "Say the first word.", "--max-new-tokens", "2"]
    if verb in ("upcycle", "sub"):
        lora = {"upcycle": "lora", "sub": "pairs"}[verb]
        experts = {"upcycle": "2", "sub": "1"}[verb]
        return ["compose", verb, str(case / lora), "--experts", experts, "--out", str(case / "out")]
    return [verb, str(case / "recipe.yaml")]


def _is_answered(outcome: Outcome) -> bool:
    is_within = outcome.cpu_s < LIMIT_S and outcome.grown_mib < LIMIT_MIB
    is_within = is_within and all("chat_template_child.py" in event for event in outcome.events)
    lines = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    if outcome.code == 0:
        return is_within and not lines and "Traceback" not in outcome.err
    is_told = bool(lines) and outcome.err.splitlines()[-1] == lines[0] and len(lines[0]) < 1500
    return is_within and (outcome.code in (2, 3, 4, 6)) and (is_told or outcome.code == 3)


__all__ = ["gate"]
