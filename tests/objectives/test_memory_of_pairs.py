"""What pairs take beside answers at the same tokens: no second model, no logits that stand whole."""

from pathlib import Path
from typing import Any

import judged_runs as runs
import pytest
import tiny
import torch
from live_bytes import peak_bytes
from transformers import AutoTokenizer

from qd2mora.base import SHAPES, base_config, random_base
from qd2mora.data import Pair, Row, collate
from qd2mora.evaluation import Subject
from qd2mora.evaluation.decoding import Decoding, Wanted
from qd2mora.evaluation.ends import Ends
from qd2mora.memory.activations import Pass
from qd2mora.memory.loss import RowLoss
from qd2mora.memory.plan import plan
from qd2mora.memory.shapes import read_shapes
from qd2mora.memory.writing import writing_bytes
from qd2mora.mixture import MixtureConfig, add_adapter
from qd2mora.objectives import Objective, Reference, Said
from qd2mora.objectives.dpo import Dpo
from qd2mora.objectives.sft import Sft
from qd2mora.recipe import Base, parse_recipe
from qd2mora.training import train

CPU = torch.device("cpu")


@pytest.mark.parametrize("model", ["random:llama2-7b", "random:tiny"])
@pytest.mark.parametrize("kind", ["dpo", "orpo", "simpo", "kto", "peam", "reward"])
def test_the_planned_peak_is_that_of_answers_at_the_same_tokens(kind: str, model: str) -> None:
    def peak(objective: str, form: str, rows: int) -> int:
        content = {
            "base": {"model": model},
            "data": {"tasks": [{"name": "a", "path": "a.jsonl", "format": form}], "max_length": 512},
            "objective": objective,
            "train": {"steps": 1, "micro_batch": rows, "global_batch": 8},
            "output": "run",
        }
        return plan(parse_recipe(content), "80GiB", CPU).peak_bytes

    form, lines = ("rated", 1) if kind == "kto" else ("preference", 2)
    assert peak(kind, form, 4 // lines) <= 1.15 * peak("sft", "instruction", 4)
    if lines == 2:
        assert peak(kind, form, 4) > 1.1 * peak(kind, form, 2)


def test_the_bytes_alive_in_a_step_are_those_of_answers_at_the_same_tokens() -> None:
    """Measured, the reference asked in the step itself."""
    base = random_base(SHAPES["tiny"], Base(model="random:tiny", compute_dtype="float32"), CPU)
    model = add_adapter(base, MixtureConfig(method="d2mora", rank=4, target_modules="all-linear"), seed=0).train()
    ids = torch.randint(4, 500, (8, 40), generator=torch.Generator().manual_seed(0), dtype=torch.int32).numpy()
    lines = [Row(0, each, 12, Pair("", "")) for each in ids]
    batch, loss, reference = collate(lines, 3), RowLoss(model, 64), Reference(model, has_start=False)

    def step(objective: Objective) -> None:
        said = None
        if objective.has_reference:
            said = reference.losses(lines, lambda: loss(batch))
        objective.losses(Said(loss(batch), lines, said)).sum().backward()
        model.zero_grad()

    assert peak_bytes(lambda: step(Dpo(0.1))) <= 1.15 * peak_bytes(lambda: step(Sft()))


ANSWERS = {
    "base": {"model": "random:tiny", "compute_dtype": "float32"},
    "data": {"tasks": [{"name": "a", "path": "a.jsonl", "format": "instruction"}], "max_length": 64},
    "objective": {"kind": "grpo", "samples": 8, "max_new_tokens": 40},
    "train": {"steps": 1, "micro_batch": 1, "global_batch": 4},
    "output": "run",
}


def test_answers_that_are_written_take_what_the_plan_says_of_them(tmp_path: Path) -> None:
    recipe = parse_recipe(ANSWERS)
    config = MixtureConfig.from_recipe(recipe.adapter, 1)
    planned = writing_bytes(read_shapes(base_config(recipe.base), config), recipe, Pass(32, 64, 4, False))
    tiny.save_tokenizer(tmp_path)
    base = random_base(SHAPES["tiny"], recipe.base, CPU)
    model = add_adapter(base, config, seed=0).eval()
    subject = Subject(model, AutoTokenizer.from_pretrained(tmp_path))
    wanted = [Wanted(list(range(4, 64)), Ends(()), 4) for _ in range(32)]
    alive: list[int] = []

    def write() -> None:
        decoding = Decoding(subject, wanted)
        while not decoding.is_done:
            decoding.step()
            if decoding._cached is not None:
                cached = decoding._cached.cache.layers
                alive.append(sum(layer.keys.nbytes + layer.values.nbytes for layer in cached))

    least = sum(planned.values())
    assert 0.5 * least < peak_bytes(write) <= least
    # Of two layers, without the copy of one; answers leave with their last token, and the one before is read by then.
    assert max(alive) == planned["keys and values of answers"] * 4 // 5 * 62 // 64


def test_where_answers_do_not_fit_at_once_the_plan_says_that_the_run_writes_fewer_and_refuses_none() -> None:
    recipe = parse_recipe(ANSWERS)
    whole = plan(recipe, "1GiB", CPU)
    assert whole.choices["answers at once"].value == 32 and whole.fits
    cached = (whole.items | whole.elsewhere)["keys and values of answers"]
    tight = plan(recipe, (whole.peak_bytes - cached // 4) * 8 // 7, CPU)  # an eighth stays in reserve
    assert tight.fits and tight.choices["answers at once"].value == 16
    assert "the run begins with them, and halves" in tight.choices["answers at once"].reason
    assert (tight.items | tight.elsewhere)["keys and values of answers"] == cached // 2
    imitating = parse_recipe({**ANSWERS, "objective": "sft"})
    assert "answers at once" not in plan(imitating, "1GiB", CPU).choices


def test_logits_stand_a_chunk_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the reference speaks."""
    tiny.save_base(tmp_path / "base")
    runs.save_rows(tmp_path / "data")
    seen: list[int] = []
    build, functional = RowLoss.__init__, torch.nn.functional.linear

    def watching(states: Any, weight: Any, bias: Any = None) -> Any:
        if weight.shape[0] == 512:  # the vocabulary
            seen.append(len(states))
        return functional(states, weight, bias)

    monkeypatch.setattr("qd2mora.base.passes.F.linear", watching)
    monkeypatch.setattr(RowLoss, "__init__", lambda self, model, chunk: build(self, model, 5))
    train(runs.recipe_of(tmp_path, tmp_path / "run", "dpo", "objective.reference=live", "train.steps=1"))
    assert seen and max(seen) == 5
