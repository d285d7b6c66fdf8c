"""How fast does a routed adapter write, beside its bare base, at batch 1 and 8?

    python scripts/bench_decode.py [--shape smollm2-135m] [--method d2mora] [--rank 8] [--tokens 32] [--prompt 64]
        [--repeats 10] [--threads 2] [--model FOLDER] [--quantization nf4] [--device cpu] [--out FILE]

One base with one adapter on it (random up experts), asked with the adapter and without, in turn, in one process, by
what `generate --file` and `serve` run. Prompts are random and ends are not obeyed: both write as many tokens. Wall time
of the tokens after the first, median and quartiles; last a line of JSON, whose `ratios` are routed over base in tokens
a second (1 is as fast). `--parts` also times what one token of the adapter costs by part, at batch 1.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from bench_parts import REPEATS, context, report, round_robin, summary, time_columns
from torch import nn

from qd2mora.base import SHAPES, load_base, load_tokenizer, random_base
from qd2mora.base.shapes import Shape
from qd2mora.evaluation import Subject
from qd2mora.evaluation.decoding import Decoding, Wanted
from qd2mora.evaluation.ends import Ends
from qd2mora.mixture import MixtureConfig, add_adapter, mixture_layers
from qd2mora.recipe import Base

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BATCHES = (1, 8)
SMOLLM2 = Shape(576, 1536, 30, 9, 3, vocab=49_152, max_length=8192, tied=True)


class NoWords:
    """In a tokenizer's place, where nothing is read: what is written is numbers."""

    pad_token_id = 0

    def decode(self, tokens: Sequence[int], **options: object) -> str:
        """Return nothing."""
        return ""


def subject_of(wishes: argparse.Namespace) -> Subject:
    """Return a base with one routed adapter on it."""
    device = torch.device(wishes.device)
    base = Base(model=wishes.model or "random:tiny", quantization=wishes.quantization)
    tokenizer: Any = NoWords()
    if wishes.model:
        model, tokenizer = load_base(base, device), load_tokenizer(wishes.model)
    else:
        model = random_base(SMOLLM2 if wishes.shape == "smollm2-135m" else SHAPES[wishes.shape], base, device)
    config = MixtureConfig(method=wishes.method, rank=wishes.rank, target_modules=TARGETS)
    if wishes.method == "d2mora":
        config = replace(config, down={"experts": 3}, up={"experts": 4})
    adapted = add_adapter(model, config, 0)
    for layer in mixture_layers(adapted).values():
        nn.init.normal_(layer.tensors("default")["mixture_B"], std=0.02)
    return Subject(adapted.eval(), tokenizer)


Steps = Callable[[], None]


def writer(subject: Subject, rows: int, wishes: argparse.Namespace, *, routed: bool) -> Callable[[], Steps]:
    """Return what makes a decoding whose prompt is read, and gives back the steps that are timed."""

    def begun() -> Steps:
        most = subject.plain.get_input_embeddings().num_embeddings
        ids = torch.randint(3, most, (rows, wishes.prompt), generator=torch.Generator().manual_seed(0)).tolist()
        decoding = Decoding(subject, [Wanted(each, Ends(()), wishes.tokens + 1) for each in ids])
        state = subject.writing if routed else subject.without_adapter
        with state():
            decoding.step()

        def steps() -> None:
            with state():
                while not decoding.is_done:
                    decoding.step()

        return steps

    return begun


def times_of(subject: Subject, rows: int, wishes: argparse.Namespace) -> dict[str, list[float]]:
    """Return seconds of all tokens after the first, with the adapter and without, in turn."""
    found: dict[str, list[float]] = {"base": [], "routed": []}
    makers = {name: writer(subject, rows, wishes, routed=name == "routed") for name in found}
    for _ in range(wishes.repeats + 1):
        for name, begun in makers.items():
            steps = begun()
            found[name] += round_robin({name: steps}, torch.device(wishes.device), 1, warm_up=0)[name]
    return {name: values[1:] for name, values in found.items()}


def parts_of(subject: Subject, wishes: argparse.Namespace) -> dict[str, float]:
    """Return milliseconds a token at batch 1 of what an adapter adds, with parts of it left out in turn."""
    layers = list(mixture_layers(subject.model).values())
    x = {layer.in_features: torch.randn(1, 1, layer.in_features, dtype=subject.plain.dtype) for layer in layers}
    device = torch.device(wishes.device)
    runs: dict[str, Callable[[], object]] = {
        "base products": lambda: [layer.base_layer(x[layer.in_features]) for layer in layers],
        "base products and adapters": lambda: [layer(x[layer.in_features]) for layer in layers],
        "u, routing and v": lambda: [layer.rank_space(x[layer.in_features], "default") for layer in layers],
        "the banks put together": lambda: [(layer.rows("default"), layer.columns("default")) for layer in layers],
    }
    subject.route({"task_index": torch.zeros(1, dtype=torch.int64)})
    with torch.no_grad():
        return {name: 1e3 * each["median_s"] for name, each in summary(round_robin(runs, device, 10)).items()}


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=["smollm2-135m", *sorted(SHAPES)], default="smollm2-135m")
    parser.add_argument("--model")
    parser.add_argument("--quantization", choices=("nf4", "none"), default="nf4")
    parser.add_argument("--method", default="d2mora")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--out")
    wishes = parser.parse_args()
    torch.set_num_threads(wishes.threads)
    subject = subject_of(wishes)
    times = {
        f"{name}, batch {rows}": values for rows in BATCHES for name, values in times_of(subject, rows, wishes).items()
    }
    ratios = {}
    for rows in BATCHES:
        pairs = zip(times[f"base, batch {rows}"], times[f"routed, batch {rows}"], strict=True)
        found = summary({"": [base / routed for base, routed in pairs]})[""]
        ratios[f"routed over base, tokens a second, batch {rows}"] = {
            "median": found["median_s"],
            "q1": found["q1_s"],
            "q3": found["q3_s"],
        }
    shown = summary(times)
    speeds = {name: wishes.tokens * int(name.rpartition(" ")[2]) / each["median_s"] for name, each in shown.items()}
    result = {**context(torch.device(wishes.device), vars(wishes)), "times": shown, "ratios": ratios}
    result["tokens_per_s"] = speeds
    if wishes.parts:
        result["parts_ms"] = parts_of(subject, wishes)
    columns = time_columns(shown, "base, batch 1") | {
        "tokens/s": {name: f"{speed:.1f}" for name, speed in speeds.items()}
    }
    report(result, columns, wishes.out)


if __name__ == "__main__":
    main()
