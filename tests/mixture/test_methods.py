"""Every row of the table, and every value of a router's fields, against slow float64 twins and finite differences."""

import math
from collections.abc import Callable

import made
import pytest
import reference_gates as gates
import reference_methods as twin
import torch
from reference import softmax
from torch import Tensor, nn

from qd2mora.mixture import MixtureLinear
from qd2mora.mixture.draws import Draws, Rows
from qd2mora.mixture.phases import PLAIN
from qd2mora.routed.routers import noisy

Twin = Callable[[dict[str, Tensor], twin.Row], Tensor]
# float64 sums of a few hundred terms, in another order.
EXACT = {"rtol": 1e-9, "atol": 1e-11}


def rows_of(layer: MixtureLinear, x: Tensor) -> list[twin.Row]:
    told = layer.routing
    return [
        twin.Row(
            x[b],
            int(told.task_index[b]),
            told.external[b],
            told.hidden[b],
            told.prompt[b].tolist(),
            None,
            told.marks[b].tolist(),
        )
        for b in range(len(x))
    ]


def check_against(layer: MixtureLinear, x: Tensor, update: Twin, scaling: float) -> None:
    """Output, and the gradient of every trainable tensor and of x."""
    x = x.clone().requires_grad_()
    named = trained = made.trained(layer)
    y = layer(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    ours = torch.autograd.grad(y, [*named.values(), x], dy, allow_unused=True)
    copies = {name: tensor.detach().clone() for name, tensor in layer.tensors("default").items()}
    leaves = {name: copies[name].requires_grad_() for name in trained}
    x_too = x.detach().clone().requires_grad_()
    base = layer.base_layer(x_too)
    if "mixture_base_scale" in copies:
        base = base * (1 + 0.2 * torch.tanh(copies["mixture_base_scale"]))
    wanted = base + scaling * torch.stack([update(copies, row) for row in rows_of(layer, x_too)])
    theirs = torch.autograd.grad(wanted, [*leaves.values(), x_too], dy, allow_unused=True)
    torch.testing.assert_close(y, wanted, **EXACT)
    assert (y - layer.base_layer(x)).norm() > 0.1
    for name, mine, other in zip([*named, "x"], ours, theirs, strict=True):
        if other is None:
            assert mine is None or mine.abs().max() < 1e-12, name
        else:
            torch.testing.assert_close(mine, other, msg=lambda text, name=name: f"{name}: {text}", **EXACT)


def test_every_row_has_a_twin() -> None:
    assert set(twin.METHODS) == set(made.NAMES)


@pytest.mark.parametrize("method", made.NAMES)
def test_a_row_of_the_table_equals_its_formula_in_output_and_gradients(method: str) -> None:
    def update(tensors: dict[str, Tensor], row: twin.Row) -> Tensor:
        return twin.update(method, tensors, row)

    check_against(made.layer_of(method), made.input_for(method), update, made.SCALING[method])


def by_gate(gate: Callable[[Tensor], Tensor]) -> Twin:
    """Paired experts under a gate of the token's own logits."""

    def update(t: dict[str, Tensor], row: twin.Row) -> Tensor:
        return torch.stack([twin.paired(gate(t["mixture_router_down"] @ x), t, x) for x in row.x])

    return update


def by_logits(logits: Callable[[dict[str, Tensor], Tensor], Tensor]) -> Twin:
    """Paired experts under softmax gates of logits made otherwise."""
    return lambda t, row: torch.stack([twin.paired(softmax(logits(t, x)), t, x) for x in row.x])


def averaged(
    which: Callable[[twin.Row, int], list[Tensor]], score: Callable[[dict[str, Tensor], Tensor], Tensor]
) -> Twin:
    """Paired experts under softmax gates of the mean of several tokens."""

    def update(t: dict[str, Tensor], row: twin.Row) -> Tensor:
        outputs = []
        for place, x in enumerate(row.x):
            read = which(row, place)
            outputs.append(twin.paired(softmax(score(t, sum(read) / len(read))), t, x))
        return torch.stack(outputs)

    return update


def prompt(row: twin.Row, place: int) -> list[Tensor]:
    return [x for x, is_prompt in zip(row.x, row.prompt, strict=True) if is_prompt]


def linear(t: dict[str, Tensor], h: Tensor) -> Tensor:
    return t["mixture_router_down"] @ h


def mlp(t: dict[str, Tensor], h: Tensor) -> Tensor:
    return t["mixture_out_down"] @ torch.relu(t["mixture_router_down"] @ h + t["mixture_bias_down"])


def doubted(t: dict[str, Tensor], h: Tensor) -> Tensor:
    """Three draws of a network, each without two of its six hidden units; what they do not agree on counts less."""
    hidden = torch.relu(t["mixture_router_down"] @ h + t["mixture_bias_down"])
    draws = []
    for draw in range(3):
        kept = torch.tensor([float(unit % 3 != draw) for unit in range(6)])
        draws.append(t["mixture_out_down"] @ (hidden * kept) * 3 / 2)
    mean = sum(draws) / 3
    return mean / (1 + sum((each - mean) ** 2 for each in draws) / 3) ** 0.5


def masked(places: Callable[[Tensor], list[int]], weight: Callable[[Tensor], Tensor]) -> Twin:
    return by_gate(lambda logits: weight(logits) * gates.mask(places(logits), len(logits)))


def two(logits: Tensor) -> list[int]:
    return gates.largest(logits, 2)


TOP = {"select": "top_k", "top_k": 2}
FIELDS: dict[str, tuple[dict[str, object], Twin]] = {
    "top-k softmax": (TOP, masked(two, softmax)),
    "top-k renorm": (TOP | {"weight": "renorm"}, by_gate(lambda logits: gates.softmax_of_chosen(logits, 2))),
    "top-k dense": (TOP | {"weight": "dense"}, by_gate(softmax)),
    "top-k soft": (TOP | {"weight": "soft"}, by_gate(lambda logits: gates.renormalised(logits, 2))),
    "soft of all": ({"weight": "soft"}, by_gate(softmax)),
    "top-k sigmoid": (TOP | {"weight": "sigmoid"}, masked(two, lambda logits: 1 / (1 + torch.exp(-logits)))),
    "top-k equal": (TOP | {"weight": "equal"}, masked(two, lambda logits: 0.5 + 0 * logits)),
    "top-k uniform": (TOP | {"weight": "uniform", "omega": 0.3}, masked(two, lambda logits: 0.3 + 0 * logits)),
    "top-k one": (TOP | {"weight": "one"}, masked(two, torch.ones_like)),
    "top-k straight-through": (
        TOP | {"weight": "straight_through"},
        by_gate(lambda logits: gates.straight_through(logits, two(logits), 1.0)),
    ),
    "top-k of all": ({"select": "top_k", "top_k": 4, "weight": "renorm"}, by_gate(softmax)),
    "temperature": (
        TOP | {"weight": "renorm", "temperature": 2.5},
        by_gate(lambda logits: gates.softmax_of_chosen(logits, 2, 2.5)),
    ),
    "entropy": (
        {"select": "entropy", "top_k": 1, "top_p": 0.5, "entropy_limit": 0.8, "entropy_order": 1.7},
        by_gate(lambda logits: gates.by_entropy(logits, 1.7, 0.8, 0.5, 1)),
    ),
    "top-p of one is all": ({"select": "entropy", "top_k": 1, "top_p": 1.0, "entropy_limit": 1.0}, by_gate(softmax)),
    "bounded": ({"weight": "bounded"}, by_gate(gates.bounded)),
    "top-k sigmoid renorm": (TOP | {"weight": "sigmoid_renorm"}, by_gate(gates.sigmoid_parts)),
    "sigmoid": ({"weight": "sigmoid"}, by_gate(lambda logits: 1 / (1 + torch.exp(-logits)))),
    "one": ({"weight": "one"}, by_gate(torch.ones_like)),
    "bias": ({"score": "bias"}, by_logits(lambda t, x: linear(t, x) + t["mixture_bias_down"])),
    "prototype": ({"score": "prototype"}, by_logits(lambda t, x: linear(t, x).abs())),
    "mlp": ({"score": "mlp", "width": 6}, by_logits(mlp)),
    "draws": ({"score": "mlp", "width": 6, "draws": 3}, by_logits(doubted)),
    "sequence": ({"granularity": "sequence"}, averaged(prompt, linear)),
    "sequence mlp": ({"granularity": "sequence", "score": "mlp", "width": 6}, averaged(prompt, mlp)),
    "sequence prototype": (
        {"granularity": "sequence", "score": "prototype"},
        averaged(prompt, lambda t, h: linear(t, h).abs()),
    ),
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_value_of_a_routers_field_means_what_it_says(field: str) -> None:
    changes, update = FIELDS[field]
    layer = made.layer_of("loramoe", gates={"down": changes})
    check_against(layer, made.input_for("loramoe"), update, made.SCALING["loramoe"])


def test_entropy_routing_uses_few_experts_and_all_of_them_in_the_twin_too() -> None:
    """The case above would prove nothing if its tokens were all sure, or all unsure."""
    t, x = made.layer_of("loramoe").tensors("default"), made.input_for("loramoe").flatten(0, 1)
    counts = {int((gates.by_entropy(linear(t, token), 1.7, 0.8, 0.5, 1) > 0).sum()) for token in x}
    assert 4 in counts and len(counts) > 1


def differing(t: dict[str, Tensor], row: twin.Row) -> Tensor:
    """Ranks 1, 2, 4: expert e owns a run of rows of A and of columns of B."""
    outputs = []
    for x in row.x:
        parts, start = [], 0
        for weight, rank in zip(softmax(linear(t, x)), (1, 2, 4), strict=True):
            own = slice(start, start + rank)
            parts.append(weight * (t["mixture_B"][:, own] @ (t["mixture_A"][own] @ x)))
            start += rank
        outputs.append(sum(parts))
    return torch.stack(outputs)


def test_ranks_of_paired_experts_may_differ() -> None:
    layer = made.layer_of("loramoe", rank=None, ranks=[1, 2, 4], down=None, up=None)
    check_against(layer, made.input_for("loramoe"), differing, made.ALPHA / 4)


@pytest.mark.parametrize("gate", [{"granularity": "sequence"}, {"score": "mlp", "width": 6}])
def test_a_first_pass_is_averaged_as_x_is(gate: dict[str, object]) -> None:
    score = mlp if gate.get("score") == "mlp" else linear

    def update(t: dict[str, Tensor], row: twin.Row) -> Tensor:
        which = {"sequence": prompt}.get(str(gate.get("granularity")))
        states = twin.Row(row.hidden, prompt=row.prompt)
        read = [which(states, place) if which else [row.hidden[place]] for place in range(len(row.x))]
        weights = [softmax(score(t, sum(each) / len(each)) + bias(t)) for each in read]
        return torch.stack([twin.paired(weight, t, x) for weight, x in zip(weights, row.x, strict=True)])

    def bias(t: dict[str, Tensor]) -> Tensor:
        return torch.zeros(()) if score is mlp else t["mixture_bias_down"]

    layer = made.layer_of("xlora", gates={"down": gate})
    check_against(layer, made.input_for("xlora"), update, made.SCALING["xlora"])


def test_a_block_has_one_router_that_reads_what_its_first_linear_reads() -> None:
    """Gate and down projections of one block: the second reads another x and adds to the same router's gradient."""
    routing = made.routing_for_rows()
    first = made.layer_of("llava_mole", routing, gates={"down": {"weight": "softmax"}})
    second = made.layer_of(
        "llava_mole", routing, key="model.layers.0.mlp.down_proj", owns=False, gates={"down": {"weight": "softmax"}}
    )
    assert {name for name in made.trained(second)} == {"mixture_A", "mixture_B"}
    x, other = made.input_for("llava_mole").requires_grad_(), made.input_for("llava_mole").flip(0)
    ours = first(x).sum() + second(other).square().sum()
    copies = {name: tensor.detach().clone().requires_grad_() for name, tensor in first.tensors("default").items()}
    banks = {name: tensor.detach().clone() for name, tensor in second.tensors("default").items()}
    x_too = x.detach().clone().requires_grad_()
    total = first.base_layer(x_too).sum()
    for b in range(made.ROWS):
        logits = [copies["mixture_router_down"] @ token + copies["mixture_bias_down"] for token in x_too[b]]
        weights = [softmax(each) * gates.mask(gates.largest(each, 1), 4) for each in logits]
        scaling = made.SCALING["llava_mole"]
        total = total + sum(scaling * twin.paired(w, copies, t).sum() for w, t in zip(weights, x_too[b], strict=True))
        pairs = zip(weights, other[b], second.base_layer(other[b]), strict=True)
        total = total + sum((base + scaling * twin.paired(w, banks, t)).square().sum() for w, t, base in pairs)
    torch.testing.assert_close(ours, total, **EXACT)
    named = made.trained(first)
    mine = torch.autograd.grad(ours, [*named.values(), x])
    theirs = torch.autograd.grad(total, [*(copies[name] for name in named), x_too])
    for one, wanted in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, wanted, **EXACT)


def test_noise_is_scaled_by_its_own_router_and_added_in_training_alone() -> None:
    clean, spread, noise = (torch.randn(4, 3) for _ in range(3))
    torch.testing.assert_close(noisy(clean, spread, noise), clean + noise * torch.log1p(spread.exp()))
    layer = made.layer_of("noisy_top_k", gates={"down": {"select": "all", "top_k": None, "weight": "softmax"}})
    x = made.input_for("noisy_top_k")
    quiet = layer(x)
    assert torch.equal(layer(x), quiet)
    layer.train()
    layer.routing.rows, layer.routing.lengths = (1, 2, 3), (5, 5, 5)
    drawn = layer.routing.draws(layer.layer_key).normal(x.new_empty(3, 5, 4), 1001)

    def update(t: dict[str, Tensor], row: twin.Row) -> Tensor:
        number = next(b for b in range(len(x)) if torch.equal(x[b], row.x.detach()))
        outputs = []
        for token, eps in zip(row.x, drawn[number], strict=True):
            both = t["mixture_router_down"] @ token
            logits = both[:4] + eps * torch.log1p(both[4:].exp())
            outputs.append(twin.paired(softmax(logits), t, token))
        return torch.stack(outputs)

    check_against(layer, x, update, made.SCALING["noisy_top_k"])


@pytest.mark.parametrize("weight", ["softmax", "sigmoid"])
def test_experts_are_left_out_in_training_alone_and_the_others_take_their_place(weight: str) -> None:
    layer = made.layer_of("loramoe", gates={"down": {"dropout": 0.8, "weight": weight}})
    x = made.input_for("loramoe")
    quiet = layer(x)
    torch.testing.assert_close(quiet, made.layer_of("loramoe", gates={"down": {"weight": weight}})(x), **EXACT)
    layer.train()
    layer.routing.rows, layer.routing.lengths = (1, 2, 3), (5, 5, 5)
    drawn = layer.routing.draws(layer.layer_key).keep(x.new_empty(3, 5, 4), 0.8, 2001) > 0
    seen = {int(number) for number in drawn.sum(-1).flatten()}
    assert 0 in seen and len(seen) > 2  # a token that would keep none keeps all

    def update(t: dict[str, Tensor], row: twin.Row) -> Tensor:
        number = next(b for b in range(len(x)) if torch.equal(x[b], row.x.detach()))
        outputs = []
        for token, kept in zip(row.x, drawn[number], strict=True):
            there = kept.double() if kept.any() else torch.ones(4, dtype=torch.float64)
            scores = linear(t, token)
            raw = scores.exp() if weight == "softmax" else 1 / (1 + torch.exp(-scores))
            gate = raw * there
            outputs.append(twin.paired(gate / gate.sum() if weight == "softmax" else gate, t, token))
        return torch.stack(outputs)

    check_against(layer, x, update, made.SCALING["loramoe"])


def test_lora_mixer_uses_all_experts_in_training_and_counts_its_choice_alone() -> None:
    layer, x = made.layer_of("lora_mixer").train(), made.input_for("lora_mixer")
    check_against(layer, x, by_gate(softmax), made.SCALING["lora_mixer"])
    step = layer.mixture_spec["default"].step_in(PLAIN)
    _, gatings = step.route(*layer._features(x, "default"))
    assert (gatings["down"].used.sum(-1) == 3).all() and (gatings["down"].weight > 0).all()


ANY = {"top_k": 2, "select": "top_k"}
DIFFERENTIABLE: list[tuple[str, dict[str, dict[str, object]]]] = [
    *((name, {}) for name in made.NAMES),
    *(("loramoe", {"down": changes}) for name, (changes, _) in FIELDS.items() if "straight" not in name),
    ("d2mora", {"down": ANY, "up": ANY | {"weight": "renorm"}}),
    ("d2mora", {"up": {"score": "noisy"}, "down": {"score": "mlp", "width": 4}}),
    ("d2mora", {"down": {"input": "external"}, "up": {"input": "hidden", "score": "bias"}}),
    ("d2mora", {"up": {"input": "none", "score": "static"}, "down": {"granularity": "sequence"}}),
    ("d2mora", {"down": {"dropout": 0.3}, "up": {"dropout": 0.3, **ANY, "weight": "renorm"}}),
    ("residual_cores", {"core": {"input": "x", "dropout": 0.3}}),
    ("comol", {"core": {"input": "x", "granularity": "sequence", "score": "noisy"}}),
    ("comol", {"core": {"score": "prototype", **ANY, "weight": "sigmoid"}}),
    ("mofme", {"core": {"score": "linear", "select": "sample", "weight": "softmax"}}),
    ("mola", {"down": {"select": "sample", "guidance": 1.0}}),
    ("smora", {"rank": {"weight": "softmax", "bias_rate": 0.0}}),
    ("smora", {"rank": {"weight": "sigmoid", "input": "external"}}),
    ("reclora", {"down": {"score": "mlp", "width": 3}}),
    ("sketchassist", {"down": {"score": "mlp", "width": 3, **ANY, "weight": "renorm"}}),
    ("ept", {"down": ANY | {"weight": "renorm"}}),
    ("clora", {"down": {"select": "all", "weight": "softmax"}}),
]


@pytest.mark.parametrize(("method", "changes"), DIFFERENTIABLE, ids=str)
def test_training_passes_finite_differences(method: str, changes: dict[str, dict[str, object]]) -> None:
    """Noise, draws and dropout are those of one key at every evaluation; selections are far from ties."""
    settings = dict(made.CHANGES.get(method, {}).get("gates", {}))
    settings = {role: settings.get(role, {}) | changes.get(role, {}) for role in {*settings, *changes}}
    more = {"external_width": made.WIDTH} if "external" in str(changes) or method == "reclora" else {}
    layer = made.layer_of(method, gates=settings, dropout=0.3, **more).train()
    layer.routing.rows, layer.routing.lengths = (7, 8, 9), (5, 4, 5)
    named = {name: tensor for name, tensor in layer.named_parameters() if tensor.requires_grad}

    def run(x: Tensor, *tensors: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(named, tensors, strict=True)), (x,))

    inputs = [made.input_for(method), *(tensor.detach().clone() for tensor in named.values())]
    assert torch.autograd.gradcheck(run, [tensor.requires_grad_() for tensor in inputs], fast_mode=True)


def test_draws_without_keys_of_rows_are_one_stream() -> None:
    draws = Draws(Rows((11,)))
    like = torch.empty(2, 3, 4)
    assert torch.equal(draws.normal(like, 1), draws.normal(like, 1))
    assert not torch.equal(draws.normal(like, 1), draws.normal(like, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("probability", [0.05, 0.5, 0.999999])
def test_a_mask_drops_the_share_asked_for_and_keeps_the_mean(probability: float, dtype: torch.dtype) -> None:
    dropped = min(round(probability * 65536), 65535) / 65536
    kept = Draws(Rows((11,))).keep(torch.empty(211, 999, dtype=dtype), probability, 1)
    share = (kept == 0).double().mean().item()
    assert abs(share - dropped) <= 5 * math.sqrt(dropped * (1 - dropped) / kept.numel())
    assert set(kept.unique().tolist()) == {0.0, torch.tensor(1 / (1 - dropped), dtype=dtype).item()}
    assert abs((kept[1:] == 0).double().mul(kept[:-1] == 0).mean().item() - dropped**2) < 0.005, "rows are independent"


def test_a_layer_on_any_module_of_one_width_is_a_mixture_beside_the_block() -> None:
    block = nn.Sequential(nn.Linear(made.D_IN, 3), nn.Tanh(), nn.Linear(3, made.D_IN)).double()
    layer = made.layer_of("noisy_top_k", base=block)
    layer.tensors("default")["mixture_B"].data.zero_()
    x = made.input_for("noisy_top_k")
    assert torch.equal(layer(x), block(x))
