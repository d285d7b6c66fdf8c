"""The model card: base and licence, method and source, data by name, scores with intervals, what an export keeps."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from qd2mora import __version__
from qd2mora.mixture.presets import find_method
from qd2mora.recipe import Recipe
from qd2mora.recipe.data import HUB

Json = Mapping[str, Any]


@dataclass(frozen=True)
class CardFacts:
    """What a card tells. kind: adapter, lora, gguf_lora, hf, exact or gguf; base: its name on the hub.

    recipe, scores: of the run, where it is known; report: the export's own, where it is one.
    """

    name: str
    kind: str
    base: str
    licence: str | None = None
    recipe: Recipe | None = None
    scores: Json | None = None
    report: Json | None = None


def card(facts: CardFacts) -> str:
    """Return the text of README.md."""
    parts = [_front(facts), f"# {facts.name.partition('/')[2]}", _what(facts), "## Load it", _load(facts)]
    if facts.recipe is not None:
        parts += ["## How it was trained", _training(facts.recipe), "## Data", _data(facts.recipe)]
    if facts.report is not None:
        parts += ["## What this export keeps", _kept(facts.report)]
    if facts.scores:
        parts += ["## Scores", _scores(facts.scores)]
    parts.append(f"Made by [qd2mora](https://pypi.org/project/qd2mora/) {__version__} from the run's own report.")
    return "\n\n".join(parts) + "\n"


def _front(facts: CardFacts) -> str:
    library = {"adapter": "peft", "lora": "peft", "gguf": "gguf", "gguf_lora": "gguf"}.get(facts.kind, "transformers")
    lines = ["---", f"base_model: {facts.base}", f"library_name: {library}"]
    if facts.licence is not None:
        lines.append(f"license: {json.dumps(facts.licence)}")
    lines += ["pipeline_tag: text-generation", "tags:", "- qd2mora"]
    if facts.recipe is not None:
        lines.append(f"- {facts.recipe.adapter.method}")
        sets = [task.path.removeprefix(HUB) for task in facts.recipe.data.tasks if task.path.startswith(HUB)]
        lines += ["datasets:", *(f"- {each}" for each in dict.fromkeys(sets))] if sets else []
    return "\n".join([*lines, "---"])


def _what(facts: CardFacts) -> str:
    forms = {
        "adapter": "The routed adapter itself: exactly what was trained.",
        "lora": "A static LoRA of a trained adapter.",
        "gguf_lora": "A static LoRA for llama.cpp and Ollama, to be put on a GGUF file of the base.",
        "hf": "Ordinary weights, the adapter merged into them.",
        "exact": "The base with its routed adapter and the code that runs it: exactly what was trained.",
        "gguf": "One file for llama.cpp and Ollama, the adapter merged into its weights.",
    }
    licence = f"Licence: {facts.licence}." if facts.licence else "Licence: that of the base; see there."
    return f"{forms[facts.kind]} Base: [{facts.base}](https://huggingface.co/{facts.base}). {licence}"


def _load(facts: CardFacts) -> str:
    base, name = facts.base, facts.name
    first = {"adapter": "import qd2mora  # pip install qd2mora; PEFT learns the method from it\n"}.get(facts.kind, "")
    model = "from transformers import AutoModelForCausalLM"
    if facts.kind in ("adapter", "lora"):
        on = f'AutoModelForCausalLM.from_pretrained("{base}")'
        lines = f'from peft import PeftModel; {model}\nmodel = PeftModel.from_pretrained({on}, "{name}")'
        return f"```python\n{first}{lines}\n```{_precision(facts)}"
    if facts.kind == "gguf":
        return f"```bash\nollama run hf.co/{name}   # or with the Modelfile: ollama create NAME -f Modelfile\n```"
    if facts.kind == "gguf_lora":
        return "```bash\n# put a GGUF file of the base beside it\nollama create NAME -f Modelfile\n```"
    code = ", trust_remote_code=True" if facts.kind == "exact" else ""
    return f'```python\n{model}\nmodel = AutoModelForCausalLM.from_pretrained("{name}"{code})\n```'


def _precision(facts: CardFacts) -> str:
    if facts.recipe is None or facts.recipe.base.quantization != "nf4":
        return ""
    return '\n\nIt was trained on the base in NF4 (`BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")`).'


def _training(recipe: Recipe) -> str:
    adapter, train = recipe.adapter, recipe.train
    method = find_method(adapter.method)
    length = f"{train.steps} steps" if train.steps else f"{train.epochs} epochs"
    source = f"Source of the method: {method.source}." if method.source else ""
    mark = {"verified": "as its authors' code", "ours": "ours"}.get(method.mark, method.mark)
    lines = [
        f"Method: `{method.name}` ({method.title}; {mark}). {source}",
        f"Rank {adapter.rank}, alpha {adapter.alpha:g}, {length} of {train.global_batch} rows, learning rate "
        f"{train.learning_rate:g}, seed {train.seed}, base in {recipe.base.quantization}.",
    ]
    return "\n\n".join(lines)


def _data(recipe: Recipe) -> str:
    """Name the data sets; of a local file no more than its own name leaves this machine."""
    lines = ["| task | data | format |", "| --- | --- | --- |"]
    for task in recipe.data.tasks:
        is_hub = task.path.startswith(HUB)
        name = f"`{task.path.removeprefix(HUB)}` on the hub" if is_hub else f"`{PurePath(task.path).name}`, not public"
        lines.append(f"| {task.name} | {name} | {task.format} |")
    return "\n".join(lines)


def _kept(report: Json) -> str:
    losses, kept = report.get("loss"), report.get("gain_kept")
    how = f"Made by `{report.get('strategy')}`, written as {report.get('dtype')}, {report.get('bytes', 0):,} bytes."
    if not isinstance(losses, Mapping):
        return f"{how} What it keeps was not measured."
    gain = "There was no gain to keep" if kept is None else f"It keeps {kept:.1%} of the adapter's gain"
    same = f"the same greedy token {report.get('greedy_agreement', 0):.1%}"
    return (
        f"{how} On {report.get('held_out_tokens', 0):,} held-out tokens, measured {report.get('measured')}: loss "
        f"{losses['base']:.4f} (base), {losses['routed']:.4f} (adapter), {losses['merged']:.4f} (this). {gain}; KL "
        f"{report.get('kl_per_token', 0):.4f} nats a token, {same}."
    )


def _scores(scores: Json) -> str:
    columns = list(scores)
    lines = ["Held-out rows, with 95% intervals.", ""]
    lines += [f"| task | metric | {' | '.join(columns)} |", f"| --- | --- |{' --- |' * len(columns)}"]
    for task, first in scores[columns[0]].items():
        cells = [_score(scores[column].get(task)) for column in columns]
        lines.append(f"| {task} | {first.get('metric')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _score(score: Json | None) -> str:
    if score is None or not isinstance(score.get("score"), int | float):
        return "-"
    form = ".4f" if score.get("metric") == "loss" else ".1%"
    low, high = score.get("interval") or (score["score"],) * 2
    return f"{format(score['score'], form)} ({format(low, form)} to {format(high, form)}), {score.get('rows')} rows"


__all__ = ["CardFacts", "card"]
