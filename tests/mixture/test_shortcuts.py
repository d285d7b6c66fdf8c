"""While text is written, adapted linears take a shorter way to the same output, and only while it is the same."""

from dataclasses import replace

import made
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from qd2mora.mixture import MixtureLinear, shortcuts
from qd2mora.mixture.layer import mixture_layers


def three(method: str, **changes: object) -> nn.ModuleDict:
    """q, k and v of one parent, each with experts and routers of its own."""
    routing, parts = made.routing_for_rows(), nn.ModuleDict()
    for number, kind in enumerate(("q_proj", "k_proj", "v_proj")):
        layer = made.layer_of(method, routing, key=f"model.layers.0.self_attn.{kind}", owns=number == 0, **changes)
        with torch.no_grad():
            for tensor in layer.tensors("default").values():
                tensor.add_(0.1 * number)
        parts[kind] = layer
    return parts


def outputs(parts: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [layer(x) for layer in mixture_layers(parts).values()]


@pytest.mark.parametrize("method", made.NAMES)
def test_the_shorter_way_gives_what_the_layer_gives(method: str) -> None:
    parts = three(method)
    x = torch.randn(made.ROWS, made.TOKENS, made.size_of(method)[0], dtype=torch.float64)
    expected = outputs(parts, x)
    with shortcuts(parts):
        found = [outputs(parts, x), outputs(parts, x.clone()), outputs(parts, x)]
    for each in found:
        for ours, theirs in zip(each, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "changes",
    [
        {"gates": {"down": {"temperature": 0.5}, "up": {"temperature": 2.0}}},
        {"gates": {"up": {"input": "x"}}},
        {"gates": {"up": {"select": "top_k", "top_k": 2}}},
        {"gates": {"down": {"score": "mlp", "width": 3}}},
    ],
)
def test_settings_of_routers_are_kept(changes: dict[str, object]) -> None:
    parts, x = three("d2mora", **changes), torch.randn(2, 1, made.D_IN, dtype=torch.float64)
    expected = outputs(parts, x)
    with shortcuts(parts):
        found = outputs(parts, x)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_linears_that_read_the_same_share_one_product_and_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    parts, x = three("d2mora"), torch.randn(2, 1, made.D_IN, dtype=torch.float64)
    widths: list[int] = []
    plain = F.linear

    def counted(x: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
        widths.append(len(weight))
        return plain(x, weight, *rest)

    rows = len(parts["q_proj"].linear_rows("default"))
    with shortcuts(parts):
        monkeypatch.setattr("qd2mora.mixture.inference.F.linear", counted)
        outputs(parts, x)
        assert widths.count(3 * rows) == 1
        widths.clear()
        with torch.no_grad():
            others = [layer(x + number) for number, layer in enumerate(mixture_layers(parts).values())]
        assert widths.count(3 * rows) == 3
        x.mul_(2)  # the same tensor, and not what it was
        again = outputs(parts, x)
    monkeypatch.undo()
    for ours, theirs in zip(again, outputs(parts, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert len(others) == 3


def test_it_is_left_where_it_would_not_be_the_same() -> None:
    parts, x = three("d2mora"), torch.randn(2, 1, made.D_IN, dtype=torch.float64)
    layer = parts["q_proj"]
    assert isinstance(layer, MixtureLinear)
    with shortcuts(parts):
        layer.enable_adapters(False)
        assert torch.equal(outputs(parts, x)[0], layer.base_layer(x))
        layer.enable_adapters(True)
        seen: list[Tensor] = []
        layer.watchers["default"] = lambda u, v, *, small: seen.append(u)
        outputs(parts, x)
        assert len(seen) == 1
        del layer.watchers["default"]
        spec = layer.mixture_spec["default"]
        weak = tuple((role, replace(gate, temperature=9.0)) for role, gate in spec.step.gates)
        layer.mixture_spec["default"] = replace(spec, step=replace(spec.step, gates=weak))
        other = outputs(parts, x)[0]
        layer.mixture_spec["default"] = spec
        assert not torch.allclose(other, outputs(parts, x)[0])
        trained = layer(x.requires_grad_())  # with gradients the layer's own function runs
        trained.sum().backward()
        assert x.grad is not None and layer.mixture_A["default"].grad is not None
    assert layer.shortcut is None


def test_after_the_block_changed_weights_are_seen() -> None:
    parts, x = three("d2mora"), torch.randn(2, 1, made.D_IN, dtype=torch.float64)
    with shortcuts(parts):
        before = outputs(parts, x)
    with torch.no_grad():
        parts["q_proj"].mixture_B["default"].mul_(2)
    with shortcuts(parts):
        after = outputs(parts, x)
    assert not torch.allclose(before[0], after[0])
    torch.testing.assert_close(after, outputs(parts, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["d2mora", "loramoe", "smora", "comol"])
def test_gates_that_are_kept_are_those_of_the_first_of_so_many_tokens(method: str) -> None:
    parts = three(method)
    prompt, *tokens = (torch.randn(2, length, made.D_IN, dtype=torch.float64) for length in (4, 1, 1, 1, 1))
    exact = [outputs(parts, x) for x in (prompt, *tokens)]
    routing = parts["q_proj"].routing
    found = []
    with shortcuts(parts, gates_every=2):
        for number, x in enumerate((prompt, *tokens)):
            routing.is_decoding = number > 0
            found.append(outputs(parts, x))
    for number in (0, 1, 3):  # the prompt, and each first of two tokens
        torch.testing.assert_close(found[number], exact[number], rtol=1e-12, atol=1e-12)
    for number, (layer, ours) in enumerate(zip(parts.values(), found[2], strict=True)):
        step = layer.mixture_spec["default"].step
        (first, small), (u, _) = (layer._features(x, "default") for x in tokens[:2])
        v = step.apply(u, small, step.route(first, small)[1])
        wanted = layer.base_layer(tokens[1]) + layer.scaling("default") * v @ layer.columns("default").T
        torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-10)
        assert not torch.allclose(ours, exact[2][number])
