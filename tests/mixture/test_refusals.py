"""Values that a method forbids end in one line that names the key and the value."""

import re
from dataclasses import fields

import pytest
from pydantic import ValidationError

from qd2mora.errors import InputRefused
from qd2mora.mixture import MixtureConfig
from qd2mora.recipe import Adapter
from qd2mora.recipe.adapter import GateFields
from qd2mora.routed.gate import Gate, numbers_of_gates


@pytest.mark.parametrize(
    ("method", "role", "fields", "key", "value"),
    [
        ("mola", "down", {"top_k": 9}, "top_k", "9"),
        ("mola", "down", {"top_k": 0}, "top_k", "0"),
        ("flylora", "rank", {"top_k": 33}, "top_k", "33"),
        ("loramoe", "down", {"top_k": 2}, "top_k", "2"),
        ("loramoe", "down", {"granularity": "batch"}, "granularity", "batch"),
        ("loramoe", "down", {"select": "topk"}, "select", "topk"),
        ("loramoe", "down", {"input": "z"}, "input", "z"),
        ("loramoe", "down", {"input": "self", "score": "activation"}, "input", "self"),
        ("loramoe", "down", {"score": "static"}, "score", "static"),
        ("loramoe", "down", {"select": "fixed"}, "select", "fixed"),
        ("loramoe", "down", {"temperature": 0.0}, "temperature", "0.0"),
        ("loramoe", "down", {"scope": "block", "score": "noisy"}, "scope", "noisy"),
        ("remix", "down", {"omega": 0.25}, "omega", "0.25"),
        ("mola", "down", {"guidance": 0.5}, "guidance", "0.5"),
        ("remix", "down", {"guidance": 0.5, "bias_rate": 0.1}, "guidance", "0.5"),
        ("mofme", "core", {"draws": 17}, "draws", "17"),
        ("hydralora", "up", {"draws": 3}, "draws", "3"),
        ("d2mora", "up", {"granularity": "sequence"}, "granularity", "sequence"),
        ("d2mora", "core", {"top_k": 1}, "core", "d2mora"),
    ],
)
def test_a_gate_that_cannot_be_is_refused_in_one_line(
    method: str, role: str, fields: dict[str, object], key: str, value: str
) -> None:
    with pytest.raises(InputRefused) as refused:
        MixtureConfig(method=method, gates={role: fields})
    line = str(refused.value)
    assert line.startswith(f"adapter.gates.{role}") and key in line and value in line and "\n" not in line


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 4}, "flexmore needs them, one for each expert: 0 first, the base's"),
        ({"ranks": [2, 4]}, "[2, 4] will not do: the first expert of flexmore is the base, of rank 0"),
        ({"ranks": [0, 3, 0]}, "[0, 3, 0] will not do: 3 ranks, each at least 1"),
    ],
)
def test_the_first_expert_of_flexmore_is_the_base(settings: dict[str, object], words: str) -> None:
    with pytest.raises(InputRefused, match=re.escape(f"adapter.ranks: {words}")):
        MixtureConfig(method="flexmore", **settings)


@pytest.mark.parametrize("name", numbers_of_gates())
def test_a_gates_number_out_of_range_is_refused_by_recipe_and_configuration_alike(name: str) -> None:
    kind, limits = numbers_of_gates()[name]
    outside = [limits.get("ge", 1) - 1, limits["gt"]] if "gt" in limits else [limits["ge"] - 1]
    outside += [limits["le"] + 1] if "le" in limits else []
    for value in (*map(kind, outside), "2", True):
        with pytest.raises(ValidationError):
            Adapter(gates={"down": {name: value}})
        with pytest.raises(InputRefused, match=rf"adapter\.gates\.down\.{name}: .* will not do"):
            MixtureConfig(method="mola", gates={"down": {name: value}})


def test_a_recipes_gate_has_the_fields_of_a_gate() -> None:
    assert list(GateFields.model_fields) == [field.name for field in fields(Gate)]


def test_a_number_of_experts_given_beats_the_methods_own_allocation() -> None:
    config = MixtureConfig(method="mola", down={"experts": 3}, up={"experts": 3})
    assert config.allocation is None and config.num_down == 3


def test_changing_a_static_gate_to_read_x_makes_the_method_depend_on_the_token() -> None:
    config = MixtureConfig(method="cat", gates={"down": {"input": "x", "score": "linear"}})
    assert (MixtureConfig(method="cat").routers.depends_on, config.routers.depends_on) == ("static", "token")


def test_a_penalty_that_aims_tasks_at_experts_needs_as_many_experts_as_tasks() -> None:
    adapter = Adapter(method="hydralora", up={"experts": 3}, penalties={"router_ce": 1.0})
    assert MixtureConfig.from_recipe(adapter, 3).num_up == 3
    with pytest.raises(InputRefused, match=r"router_ce: .*; 4 tasks, 3 experts"):
        MixtureConfig.from_recipe(adapter, 4)
