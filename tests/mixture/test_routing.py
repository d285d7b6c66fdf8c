"""Routers inside a whole tiny LLaMA: what a row may see, what a cache keeps, what recomputing and splitting change."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import DynamicCache

from qd2mora.base import SHAPES, load_base, random_base
from qd2mora.mixture import MixtureConfig, mixture_layers, routing_of
from qd2mora.mixture.presets import METHODS
from qd2mora.recipe import Base
from qd2mora.routed.routers import top_k_mask

NAMES = tuple(name for name, row in METHODS.items() if row.backend == "ours" and row.placement != "mlp")
TARGETS = ["q_proj", "v_proj", "gate_proj", "down_proj"]
FOUR = {"experts": 4}
CHANGES: dict[str, dict[str, object]] = {
    "mola": {"down": None, "up": None, "allocation": "2-4"},
    "smora": {"gates": {"rank": {"top_k": 2}}},
    "mora": {"gates": {"rank": {"top_k": 2}}},
    "flylora": {"gates": {"rank": {"top_k": 2}}},
    "noisy_top_k": {"target_modules": ["mlp"]},
    "reclora": {"external_width": 3},
    "moelora": {"num_tasks": 3},
    "sketchassist": {"num_tasks": 3},
    "ept": {"num_tasks": 3, "down": {"experts": 8}, "up": {"experts": 8}},
    "peam": {"num_tasks": 3},
}
# Routers that average over tokens, beside the rows of the table.
AVERAGED = {
    "sequence": ("loramoe", {"gates": {"down": {"granularity": "sequence"}}}),
}
ALL = (*NAMES, *AVERAGED)
READS_FIRST_PASS = ("xlora",)
READS_PROMPT = ("base_gate", "sequence")
IDS = torch.randint(3, 500, (3, 10), generator=torch.Generator().manual_seed(1))
LENGTHS = (10, 7, 5)
PROMPTS = (4, 3, 2)


def dense_base() -> nn.Module:
    return random_base(SHAPES["tiny"], Base(model="random:tiny", quantization="none"), torch.device("cpu"))


def nf4_base() -> nn.Module:
    return load_base(Base(model="random:tiny"))


def config_of(name: str, **changes: object) -> MixtureConfig:
    method, more = AVERAGED.get(name, (name, CHANGES.get(name, {})))
    settings: dict[str, object] = {"method": method, "rank": 4, "alpha": 8, "target_modules": TARGETS}
    settings["task_type"] = "CAUSAL_LM"
    if METHODS[method].pairing == "tied" and METHODS[method].down > 1:
        settings |= {"down": FOUR, "up": FOUR}
    return MixtureConfig(**(settings | more | changes))


def adapted(name: str, base: Callable[[], nn.Module] = dense_base, **changes: object) -> PeftModel:
    """A model whose adapter does something: random tensors, the same for the same name."""
    model = get_peft_model(base(), config_of(name, **changes))
    torch.manual_seed(7)
    for key, tensor in model.named_parameters():
        if "mixture_" in key:
            nn.init.normal_(tensor, std=0.3)
    return model.eval()


def batch_of(name: str, rows: list[int], side: str = "right", width: int | None = None) -> dict[str, Tensor]:
    """Rows padded to one width, with all that a router may ask of them."""
    width = width or max(LENGTHS[row] for row in rows)
    ids, mask = torch.full((len(rows), width), 3), torch.zeros(len(rows), width, dtype=torch.long)
    prompt = torch.zeros(len(rows), width, dtype=torch.bool)
    for number, row in enumerate(rows):
        start = 0 if side == "right" else width - LENGTHS[row]
        ids[number, start : start + LENGTHS[row]] = IDS[row, : LENGTHS[row]]
        mask[number, start : start + LENGTHS[row]] = 1
        prompt[number, start : start + PROMPTS[row]] = True
    batch = {"input_ids": ids, "attention_mask": mask, "prompt_mask": prompt}
    batch["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
    method = AVERAGED.get(name, (name,))[0]
    if METHODS[method].gates.reads_task:
        batch["task_index"] = torch.tensor([2, 0, 1])[rows]
    if METHODS[method].gates.reads_vector:
        batch["external"] = torch.eye(3)[rows]
    if METHODS[method].gates.reads_spans:
        # A span in each prompt, from its second token on.
        batch["marks"] = (prompt & (mask.cumsum(-1) > 1)) * torch.tensor([1, 2, 4])[rows].unsqueeze(1)
    batch["group"] = torch.tensor([0, 1, 1])[rows]
    return batch


def told_of(batch: dict[str, Tensor], start: int = 0, stop: int | None = None) -> dict[str, Tensor]:
    """What is said of the rows of a batch to a pass over some of its tokens."""
    told = {key: batch[key] for key in ("task_index", "external") if key in batch}
    return told | {key: batch[key][:, start:stop] for key in ("marks",) if key in batch}


def logits(model: PeftModel, batch: dict[str, Tensor]) -> list[Tensor]:
    """Return each row's logits at its real tokens."""
    with torch.no_grad():
        out = model(**batch).logits
    return [row[mask.bool()] for row, mask in zip(out, batch["attention_mask"], strict=True)]


@pytest.mark.parametrize("name", ALL)
def test_a_row_sees_neither_its_batch_mates_nor_the_padding_nor_later_tokens(name: str) -> None:
    model = adapted(name)
    whole = logits(model, batch_of(name, [0, 1, 2]))
    for rows, side, width in (([2], "right", None), ([2, 1], "right", 13), ([1, 0, 2], "left", 12)):
        for row, ours in zip(rows, logits(model, batch_of(name, rows, side, width)), strict=True):
            # float32 through two layers, in products of other shapes
            torch.testing.assert_close(ours, whole[row], rtol=1e-4, atol=1e-4)
    later = batch_of(name, [0, 1, 2])
    later["input_ids"][:, 4:] = 11
    for row, ours in enumerate(logits(model, later)):
        torch.testing.assert_close(ours[:4], whole[row][:4], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(ours[4:], whole[row][4:], atol=1e-2)
    with model.disable_adapter():
        assert not torch.allclose(logits(model, batch_of(name, [0]))[0], whole[0], atol=1e-2)


@pytest.mark.parametrize("base", [dense_base, nf4_base])
@pytest.mark.parametrize("name", ALL)
def test_a_fresh_adapter_is_its_base_whatever_the_routers_say(name: str, base: Callable[[], nn.Module]) -> None:
    model = get_peft_model(base(), config_of(name)).eval()
    torch.manual_seed(3)
    for key, tensor in model.named_parameters():
        if "mixture_router" in key or "mixture_logits" in key or "mixture_select_bias" in key:
            nn.init.normal_(tensor)
    batch = batch_of(name, [0, 1, 2])
    ours = logits(model, batch)
    with model.disable_adapter():
        wanted = logits(model, batch)
    assert all(torch.equal(one, other) for one, other in zip(ours, wanted, strict=True))


@pytest.mark.parametrize("name", [name for name in ALL if name not in READS_FIRST_PASS])
def test_decoding_from_a_cache_equals_one_pass(name: str) -> None:
    """The first four tokens at once, then one by one; the routing of the prompt is kept."""
    model, batch = adapted(name), batch_of(name, [0])
    whole, cache = logits(model, batch)[0], None
    pieces = []
    for start, stop in [(0, 4), *((place, place + 1) for place in range(4, 10))]:
        with torch.no_grad():
            told = told_of(batch, start, stop)
            out = model(batch["input_ids"][:, start:stop], past_key_values=cache, use_cache=True, **told)
        cache = out.past_key_values
        pieces.append(out.logits[0])
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=1e-4, atol=1e-4)


def greedy(model: PeftModel, name: str, number: int) -> list[list[int]]:
    """Each row's continuation, one whole pass for every token."""
    rows = []
    for row in range(3):
        ids = IDS[row : row + 1, : PROMPTS[row]]
        for _ in range(number):
            batch = batch_of(name, [row])
            prompt = torch.arange(ids.shape[1])[None] < PROMPTS[row]
            told = told_of(batch, stop=ids.shape[1])
            with torch.no_grad():
                out = model(input_ids=ids, prompt_mask=prompt, use_cache=False, **told).logits
            ids = torch.cat([ids, out[:, -1].argmax(-1, keepdim=True)], -1)
        rows.append(ids[0, PROMPTS[row] :].tolist())
    return rows


@pytest.mark.parametrize(
    "name", ["d2mora", "moelora", "reclora", "base_gate", "sequence", "llava_mole", "xlora", "clora"]
)
def test_generate_gives_what_whole_passes_give(name: str) -> None:
    model = adapted(name)
    wanted = greedy(model, name, 4)
    width = max(PROMPTS)
    ids, mask = torch.full((3, width), 3), torch.zeros(3, width, dtype=torch.long)
    for row in range(3):
        ids[row, width - PROMPTS[row] :] = IDS[row, : PROMPTS[row]]
        mask[row, width - PROMPTS[row] :] = 1
    told = told_of(batch_of(name, [0, 1, 2]))
    if "marks" in told:
        told["marks"] = (mask.cumsum(-1) > 1) * torch.tensor([[1], [2], [4]])
    settings = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": 3, "eos_token_id": None}
    out = model.generate(input_ids=ids, attention_mask=mask, use_cache=name != "xlora", **settings, **told)
    assert out[:, width:].tolist() == wanted


def test_an_answer_does_not_change_the_routing_of_its_prompt() -> None:
    model, batch = adapted("sequence"), batch_of("sequence", [0, 1, 2])
    layer = next(iter(mixture_layers(model).values()))
    logits(model, batch)
    x = torch.randn(3, 10, layer.in_features)
    before = layer.mixing(x, "default")
    answer = x.clone()
    answer[:, 4:] += 1
    assert torch.equal(layer.mixing(answer, "default"), before)
    answer[:, :2] += 1
    assert not torch.allclose(layer.mixing(answer, "default"), before)


@pytest.mark.parametrize("name", ["base_gate", "sequence"])
def test_routing_by_the_prompt_needs_to_know_the_prompt(name: str) -> None:
    batch = batch_of(name, [0])
    del batch["prompt_mask"]
    with pytest.raises(ValueError, match=r"prompt_mask=\(batch, length\)"):
        logits(adapted(name), batch)


def training_gradients(model: PeftModel, batch: dict[str, Tensor], **checkpointing: bool) -> dict[str, Tensor]:
    model.train()
    inner = model.base_model.model
    if checkpointing:
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
        inner.enable_input_require_grads()
    routing_of(model).rows, routing_of(model).lengths = (11, 12, 13), LENGTHS
    model.zero_grad()
    labels = batch["input_ids"].masked_fill((batch["attention_mask"] == 0) | batch["prompt_mask"], -100)
    model(**batch, labels=labels, use_cache=False).loss.backward()
    return {key: tensor.grad.clone() for key, tensor in model.named_parameters() if tensor.grad is not None}


CHECKPOINTED = ["d2mora", "loramoe", "dynmole", "llava_mole", "flylora", "remix", "moelora", "noisy_top_k", "base_gate"]


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_recomputing_layers_changes_no_gradient_penalty_or_count(name: str, use_reentrant: bool) -> None:
    results = []
    for checkpointing in ({}, {"use_reentrant": use_reentrant}):
        model = adapted(name, dropout=0.2)
        gradients = training_gradients(model, batch_of(name, [0, 1, 2]), **checkpointing)
        routing = routing_of(model)
        results.append((gradients, routing.take_values(), dict(routing.counts)))
    (kept, values, counts), (again, values_again, counts_again) = results
    assert kept.keys() == again.keys() and kept
    assert all(torch.equal(gradient, again[key]) for key, gradient in kept.items())
    assert values_again == pytest.approx(values) and bool(values) == bool(config_of(name).routing_penalties)
    assert counts.keys() == counts_again.keys() and all(torch.equal(counts[k], counts_again[k]) for k in counts)


@pytest.mark.parametrize("name", ["d2mora", "dynmole", "noisy_top_k", "flylora", "llava_mole"])
def test_the_split_into_micro_batches_changes_no_gradient_and_no_count(name: str) -> None:
    """Penalties over rows; dropout and noise follow the row, not its place in a batch."""
    model = adapted(name, dropout=0.1).train()
    for layer in mixture_layers(model).values():
        spec = layer.mixture_spec["default"]
        for penalty in spec.penalties:
            object.__setattr__(penalty, "over", "row")
    routing, rows = routing_of(model), [0, 1, 2, 0, 1, 2, 1, 0]
    results = []
    for size in (8, 4, 2, 1):
        model.zero_grad()
        routing.counts.clear()
        for start in range(0, 8, size):
            part = list(range(start, start + size))
            batch = batch_of(name, [rows[number] for number in part])
            routing.rows = tuple(100 + number for number in part)
            routing.lengths = tuple(LENGTHS[rows[number]] for number in part)
            routing.share = (sum(routing.lengths) / sum(LENGTHS[row] for row in rows), size / 8)
            weight = batch.pop("attention_mask")
            out = model(**batch, attention_mask=weight, use_cache=False).logits
            (out.square().mean(-1) * weight).sum().backward()
        gradients = {key: tensor.grad.clone() for key, tensor in model.named_parameters() if tensor.grad is not None}
        results.append((gradients, {key: counted.clone() for key, counted in routing.counts.items()}))
    whole, counts = results[0]
    for gradients, counted in results[1:]:
        for key, gradient in whole.items():
            # Sums in another order, of terms that nearly cancel in a router; another mask would be off by its size.
            assert (gradients[key] - gradient).norm() <= 1e-4 * gradient.norm(), key
        assert all(torch.equal(counts[key], counted[key]) for key in counts)


@pytest.mark.parametrize("name", ["flylora", "smora"])
def test_selection_biases_move_once_a_step_against_the_load_of_real_tokens_and_never_in_evaluation(name: str) -> None:
    model, rate = adapted(name), METHODS[name].gates["rank"].bias_rate
    layers = mixture_layers(model)
    before = {key: layer.tensors("default")["mixture_select_bias_rank"].clone() for key, layer in layers.items()}
    logits(model, batch_of(name, [0, 1, 2]))
    model.base_model.after_step()
    assert all(
        torch.equal(layers[key].tensors("default")["mixture_select_bias_rank"], old) for key, old in before.items()
    )
    for _ in range(2):
        training_gradients(model, batch_of(name, [0, 1, 2]))
    counts = dict(routing_of(model).counts)
    # Two ranks for each of 22 real tokens, twice.
    assert len(counts) == len(layers) and all(int(used.sum()) == 2 * 2 * sum(LENGTHS) for used in counts.values())
    model.base_model.after_step()
    assert not routing_of(model).counts
    for key, old in before.items():
        used = counts["default", f"{key}:rank"]
        moved = layers[key].tensors("default")["mixture_select_bias_rank"] - old
        torch.testing.assert_close(moved, rate * (used.mean() - used).sign(), rtol=1e-2, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_adapter_is_the_same_bit_for_bit_frozen_tensors_and_biases_included(name: str, tmp_path: Path) -> None:
    model, batch = adapted(name), batch_of(name, [0, 1])
    before = logits(model, batch)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(dense_base(), tmp_path).eval()
    for one, other in zip(logits(again, batch), before, strict=True):
        # EPT's kernels are slices of one tensor, whose products round by where it lies in memory.
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 if name == "ept" else 0)
    ours, theirs = ({k: t for k, t in m.named_parameters() if "mixture_" in k} for m in (model, again))
    assert ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


@pytest.mark.parametrize("name", ["moelora", "ept", "peam", "sketchassist"])
def test_unknown_tasks_are_refused_by_number(name: str) -> None:
    model, batch = adapted(name), batch_of(name, [0])
    for outside in (3, -1):
        batch["task_index"] = torch.tensor([outside])
        with pytest.raises(ValueError, match=rf"task_index \[{outside}\] is outside the 3 tasks"):
            logits(model, batch)


@pytest.mark.parametrize("name", ["d2mora", "sequence"])
def test_beam_search_takes_the_routing_along(name: str) -> None:
    """With a cache, whose rows beam search reorders, as without one."""
    model = adapted(name)
    ids = IDS[:2, :4]
    settings = {"num_beams": 3, "do_sample": False, "max_new_tokens": 6, "pad_token_id": 3, "eos_token_id": None}
    told = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    cached = model.generate(**told, **settings, use_cache=True)
    chosen = [best_of_beams(model, ids[row : row + 1], 3, 6, name) for row in range(2)]
    assert cached[:, 4:].tolist() == chosen


def test_a_cache_that_is_emptied_and_filled_again_is_followed_once() -> None:
    model, cache = adapted("sequence"), DynamicCache()
    told = {"input_ids": IDS[:2, :4], "attention_mask": torch.ones(2, 4, dtype=torch.long)}
    routing = routing_of(model)
    for _ in range(2):
        cache.reset()
        with torch.no_grad():
            model(**told, past_key_values=cache, use_cache=True)
    before = [mean.clone() for mean in routing.means.values()]
    cache.reorder_cache(torch.tensor([1, 0]))
    assert all(torch.equal(now, old.flip(0)) for now, old in zip(routing.means.values(), before, strict=True))


def best_of_beams(model: PeftModel, prompt: Tensor, beams: int, number: int, name: str) -> list[int]:
    """Beam search written out, one whole pass for every token of every beam."""
    kept: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(number):
        grown = []
        for score, tokens in kept:
            ids = torch.cat([prompt, torch.tensor([tokens], dtype=torch.long)], -1)
            is_prompt = torch.arange(ids.shape[1])[None] < prompt.shape[1]
            with torch.no_grad():
                out = model(input_ids=ids, prompt_mask=is_prompt, use_cache=False).logits[0, -1].log_softmax(-1)
            best = out.topk(beams)
            grown += [(score + float(value), [*tokens, int(token)]) for value, token in zip(*best, strict=True)]
        kept = sorted(grown, reverse=True)[:beams]
    return kept[0][1]


def test_of_equal_scores_the_first_experts_are_chosen_on_every_device() -> None:
    scores = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 2.0, 2.0, 3.0]])
    assert top_k_mask(scores, 3).tolist() == [[1, 1, 1, 0, 0], [0, 1, 1, 0, 1]]
