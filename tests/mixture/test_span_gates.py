"""Gates by the mark of a span: open inside it, exactly zero outside, learned and parted where a mark has gates."""

import made
import pytest
import torch
from reference import softmax
from test_routing import adapted, batch_of, logits
from torch import Tensor

from qd2mora.errors import InputRefused
from qd2mora.mixture import MixtureConfig
from qd2mora.mixture.balance import PENALTIES, view
from qd2mora.mixture.layer import mixture_layers
from qd2mora.mixture.method import Penalty
from qd2mora.routed.routers import Gating

LEARNED = {"down": {"select": "all", "weight": "softmax"}}
EXACT = {"rtol": 1e-9, "atol": 1e-11}


@pytest.mark.parametrize("gates", [None, LEARNED, {"down": {"select": "all", "weight": "sigmoid"}}])
@pytest.mark.parametrize("experts", [4, 1])
def test_outside_of_its_span_an_adapter_adds_nothing_to_the_bit(gates: dict[str, object] | None, experts: int) -> None:
    count = {"experts": experts}
    layer, x = made.layer_of("clora", gates=gates, down=count, up=count), made.input_for("clora")
    layer.routing.marks = layer.routing.marks.clamp_max(experts)
    outside = layer.routing.marks == 0
    y, base = layer(x), layer.base_layer(x)
    assert torch.equal(y[outside], base[outside])
    assert ((y - base)[~outside].norm(dim=-1) > 1e-3).all()


def test_outside_of_spans_nothing_is_learned_and_a_mark_teaches_its_own_expert_alone() -> None:
    layer, x = made.layer_of("clora").train(), made.input_for("clora")
    layer.routing.marks = torch.tensor([[0, 0, 0, 0, 0], [0, 3, 3, 0, 0], [0, 0, 0, 0, 0]])
    layer(x).square().sum().backward()
    for name in ("mixture_A", "mixture_B"):
        gradient = layer.tensors("default")[name].grad
        assert gradient[2].any() and not gradient[[0, 1, 3]].any()


def test_learned_gates_of_a_mark_are_the_softmax_of_its_row_and_start_at_its_own_expert() -> None:
    layer, x = made.layer_of("clora", gates=LEARNED), made.input_for("clora")
    t = layer.tensors("default")
    wanted = layer.base_layer(x).clone()
    for row, marks in enumerate(layer.routing.marks.tolist()):
        for place, mark in enumerate(marks):
            if mark:
                weights = softmax(t["mixture_logits_down"][mark - 1])
                pairs = zip(weights, t["mixture_A"], t["mixture_B"], strict=True)
                wanted[row, place] += made.SCALING["clora"] * sum(
                    g * (up @ (down @ x[row, place])) for g, down, up in pairs
                )
    torch.testing.assert_close(layer(x), wanted, **EXACT)
    fresh = next(iter(mixture_layers(adapted_fresh()).values())).tensors("default")["mixture_logits_down"]
    assert fresh.argmax(-1).tolist() == [0, 1, 2, 3]


def adapted_fresh() -> torch.nn.Module:
    from peft import get_peft_model
    from test_routing import config_of, dense_base

    return get_peft_model(dense_base(), config_of("clora", gates=LEARNED))


def test_tokens_before_the_first_span_are_the_bases_to_the_bit_in_a_whole_model() -> None:
    model, batch = adapted("clora"), batch_of("clora", [0, 1, 2])
    batch["marks"] = torch.zeros_like(batch["marks"])
    batch["marks"][:, 3:5] = 2
    ours = logits(model, batch)
    with model.disable_adapter():
        base = logits(model, batch)
    for one, other in zip(ours, base, strict=True):
        assert torch.equal(one[:3], other[:3])
        assert not torch.allclose(one[3:], other[3:], atol=1e-2)


def slow_contrast(probs: Tensor, marks: Tensor, counted: Tensor) -> float:
    """In words: the mean gates of each mark, told from the others' by a softmax of cosines over 0.1."""
    means = []
    for mark in sorted({int(each) for each in marks[counted > 0]} - {0}):
        own = [p for p, each, counts in zip(probs, marks, counted, strict=True) if each == mark and counts]
        means.append(sum(own) / len(own))
    losses = []
    for one in means:
        likeness = torch.stack([torch.dot(one, other) / one.norm() / other.norm() / 0.1 for other in means])
        losses.append(-float(torch.log(softmax(likeness)[[each is one for each in means].index(True)])))
    return sum(losses) / len(losses) if losses else 0.0


def test_the_contrast_is_its_formula_and_zero_where_one_mark_is_alone() -> None:
    torch.manual_seed(0)
    probs = torch.randn(3, 5, 4, dtype=torch.float64).softmax(-1)
    counted = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    several = made.routing_for_rows().marks
    gating = Gating(probs, probs, probs.log())
    for marks in (several, several.clamp_max(1), torch.zeros_like(several)):
        value = PENALTIES["span_contrast"](
            view(gating, counted, False, None, None, marks), Penalty("span_contrast", 1.0)
        )
        wanted = slow_contrast(probs.flatten(0, 1), marks.flatten(), counted.flatten())
        assert float(value) == pytest.approx(wanted, abs=1e-9)
    rows = PENALTIES["span_contrast"](view(gating, counted, True, None, None, several), Penalty("span_contrast", 1.0))
    own = [slow_contrast(*each) for each in zip(probs, several, counted, strict=True)]
    torch.testing.assert_close(rows, torch.tensor(own, dtype=torch.float64))


def test_the_contrast_parts_the_gates_of_different_marks() -> None:
    layer = made.layer_of("clora", gates=LEARNED, penalties={"span_contrast": 1.0}).train()
    x = made.input_for("clora")
    table = layer.tensors("default")["mixture_logits_down"]
    table.data.copy_(0.3 * torch.randn(4, 4, generator=torch.Generator().manual_seed(2)))
    likeness = [alike(table)]
    for _ in range(60):
        for tensor in layer.parameters():
            tensor.grad = None
        (0.0 * layer(x).sum()).backward()  # the penalty alone
        table.data -= 2.0 * table.grad
        likeness.append(alike(table))
    assert likeness[-1] < 0.5 * likeness[0]


def alike(table: Tensor) -> float:
    unit = torch.nn.functional.normalize(table.detach().softmax(-1), dim=-1)
    return float((unit @ unit.T).tril(-1).sum() / 6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gates": {"down": {"select": "sample", "top_k": 1}}}, "select: sample with weight: one will not do"),
        ({"gates": {"down": {"scope": "block"}}}, "a router of the block cannot read span"),
        ({"gates": {"down": {"granularity": "sequence"}}}, "granularity: sequence averages x or hidden"),
        ({"gates": {"down": {"score": "mlp", "width": 3}}}, "score: mlp will not do with input: span"),
        ({"penalties": {"lb_mixtral": 0.1}}, "lb_mixtral: it needs gates that are open at every token"),
        ({"method": "loramoe", "penalties": {"span_contrast": 0.1}}, "span_contrast: it needs a gate with input: span"),
    ],
)
def test_what_spans_cannot_do_is_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(InputRefused, match=words):
        MixtureConfig(**({"method": "clora"} | changes))


def test_marks_that_are_missing_or_name_no_expert_are_refused() -> None:
    model, batch = adapted("clora"), batch_of("clora", [0])
    marks = batch.pop("marks")
    with pytest.raises(ValueError, match="pass marks"):
        logits(model, batch)
    with pytest.raises(ValueError, match="marks up to 5 for the 4 adapters"):
        logits(model, batch | {"marks": marks + 4})
    with pytest.raises(ValueError, match="marks of"):
        logits(model, batch | {"marks": marks[:, :3]})
