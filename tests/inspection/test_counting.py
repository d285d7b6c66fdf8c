"""Counting routers in a real model: against a loop over tokens, padding left out, nothing changed, alarms where due."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from peft import PeftModel

from qd2mora.base import load_base, load_tokenizer
from qd2mora.data import collate, prepare
from qd2mora.inspection import RoutingWatch, collapse_line, routing_report
from qd2mora.inspection.routing_summary import measured, summary
from qd2mora.memory.loss import labelled_states
from qd2mora.mixture import MixtureConfig, add_adapter, mixture_layers
from qd2mora.mixture.presets import METHODS
from qd2mora.recipe import load_recipe


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    tiny.save_base(folder / "base")
    tiny.save_tasks(folder / "data", with_more=True)
    return folder


def opened(made: Path, *overrides: str, method: str = "d2mora") -> tuple[PeftModel, list[dict[str, torch.Tensor]]]:
    path = made / "recipe.yaml"
    path.write_text(tiny.recipe_text(made / "base", made / "data", made / "run", method=method), encoding="utf-8")
    recipe = load_recipe(path, overrides)
    tokenizer = load_tokenizer(str(made / "base"))
    tasks = prepare(recipe.data, tokenizer, 0)
    rows = [row for task in tasks for row in task.validation[:3]]
    rows[0] = replace(rows[0], ids=rows[0].ids[:20], masked=5, earlier=())  # a short row, so that there is padding
    model = add_adapter(load_base(recipe.base), MixtureConfig.from_recipe(recipe.adapter, len(tasks)), 0).eval()
    return model, [collate(rows[:4], 3), collate(rows[4:], 3)]


def run(model: PeftModel, batches: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [labelled_states(model, batch) for batch in batches]


def watched(model: PeftModel, batches: list[dict[str, torch.Tensor]]) -> RoutingWatch:
    watch = RoutingWatch(model, 2)
    with watch.watching():
        run(model, batches)
    return watch


def test_usage_by_task_is_the_mean_gate_over_tokens_that_are_not_padding(made: Path) -> None:
    model, batches = opened(made)
    assert any(not bool(batch["attention_mask"].all()) for batch in batches)
    seen: dict[str, list[torch.Tensor]] = {}
    layers = mixture_layers(model)

    def keep(name: str):
        def hook(layer, inputs):
            seen.setdefault(name, []).append(inputs[0].detach().double())

        return hook

    handles = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers.items()]
    run(model, batches)
    for handle in handles:
        handle.remove()
    watch = watched(model, batches)
    for name, layer in layers.items():
        tensors = {key: tensor.detach().double() for key, tensor in layer.tensors("default").items()}
        sums: dict[tuple[str, int], list[torch.Tensor]] = {}
        for batch, x in zip(batches, seen[name], strict=True):
            for row in range(len(x)):
                for token in range(int(batch["attention_mask"][row].sum())):
                    alpha = (tensors["mixture_router_down"] @ x[row, token]).softmax(0)
                    z = sum(a * (A @ x[row, token]) for a, A in zip(alpha, tensors["mixture_A"], strict=True))
                    beta = (tensors["mixture_router_up"] @ z).softmax(0)
                    task = int(batch["task_index"][row])
                    sums.setdefault(("down", task), []).append(alpha)
                    sums.setdefault(("up", task), []).append(beta)
        for (role, task), gates in sums.items():
            found = watch.routers[name, role].measured()
            assert found is not None and found.tokens[task] == len(gates)
            assert found.usage[task] == pytest.approx(torch.stack(gates).mean(0).tolist(), rel=1e-4)


def test_watching_changes_no_bit_of_what_runs(made: Path) -> None:
    model, batches = opened(made, "adapter.dropout=0.1")
    plain = run(model, batches)
    state = torch.get_rng_state()
    watch = RoutingWatch(model, 2)
    with watch.watching():
        again = run(model, batches)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one, two) for one, two in zip(plain, again, strict=True))


def plant(model: PeftModel, role: str = "down", share: float = 1.0) -> None:
    """Bias a router onto one expert: a row that reads the same direction in every token, strongly."""
    layer = next(iter(mixture_layers(model).values()))
    with torch.no_grad():
        x = torch.ones(layer.in_features)
        router = layer.tensors("default")[f"mixture_router_{role}"]
        router.zero_()
        router[0] = 50 * x


def test_a_planted_collapse_raises_the_alarm_and_a_fresh_adapter_none(made: Path) -> None:
    model, batches = opened(made, "adapter.targets=[q_proj]")
    assert collapse_line(measured(watched(model, batches))) is None
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding.copy_(embedding.abs())  # the norm keeps signs, so that one direction is in every token
    plant(model)
    found = measured(watched(model, batches))
    line = collapse_line(found)
    assert line is not None and "\n" not in line
    assert line.startswith("routing collapsed in 1 of 4 routers: model.layers.0.self_attn.q_proj (down) sends 100%")
    numbers = summary(found, model)
    assert numbers["collapsed"] == 1 and numbers["dead_experts"] >= 3
    content = routing_report(watched(model, batches), model, ["first", "last"], {}, 3)
    assert content.alarm == line
    assert [router.collapsed for router in content.routers] == [True, False, False, False]


def test_an_expert_for_every_task_is_no_collapse(made: Path) -> None:
    model, batches = opened(made, "adapter.down.experts=2", "adapter.up.experts=2", method="peam")
    watch = watched(model, batches)
    assert collapse_line(measured(watch)) is None
    for router in watch.routers.values():
        found = router.measured()
        assert found is not None and found.usage == [[1, 0], [0, 1]]
        assert found.mutual_information == pytest.approx(torch.tensor(2.0).log().item())


SETTINGS: dict[str, list[str]] = {
    "mola": ["adapter.allocation=2-4"],
    "noisy_top_k": ["adapter.targets=[mlp]"],
    "reclora": ["adapter.external_width=3", "data.tasks.0.vector=who", "data.tasks.1.vector=who"],
    "flexmore": ["adapter.rank=null", "adapter.ranks=[0,1,2,3]", "adapter.targets=null"],
    "smora": ["adapter.gates={rank: {top_k: 2}}"],
    "mora": ["adapter.gates={rank: {top_k: 2}}"],
    "flylora": ["adapter.gates={rank: {top_k: 2}}"],
    "clora": tiny.SPANNED,
}


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.given != "needed"])
def test_every_method_is_watched(method: str, made: Path) -> None:
    model, batches = opened(made, *SETTINGS.get(method, []), method=method)
    watch = watched(model, batches)
    content = routing_report(watch, model, ["first", "last"], {}, None)
    row = METHODS[method]
    if not row.gates or row.backend == "peft":
        assert content.note is not None and not content.routers
        return
    assert content.routers and len(content.routers) == len(watch.routers)
    for router in content.routers:
        assert sum(router.measures.load) == pytest.approx(1)
        assert router.measures.max_load >= 1 - 1e-9 >= router.measures.min_load - 1e-6
        assert all(len(usage) == router.experts and sum(usage) == pytest.approx(1) for usage in router.measures.usage)
        # EPT's gates are as good as hard, and two tasks may well share two of eight experts.
        assert not router.collapsed or method == "ept"


def test_sums_of_two_processes_are_those_of_all_rows(made: Path) -> None:
    model, batches = opened(made)
    whole, parts = watched(model, batches), [watched(model, [batch]) for batch in batches]
    sent: list[torch.Tensor] = []
    parts[1].reduce(lambda sums: sent.append(sums) or sums, torch.device("cpu"))
    parts[0].reduce(lambda sums: sums + sent[0], torch.device("cpu"))
    empty = RoutingWatch(model, 2)
    empty.reduce(lambda sums: sent.append(sums) or sums, torch.device("cpu"))  # a process may have had no row
    assert len(sent[1]) == len(sent[0]) and not sent[1].any()
    for key, router in whole.routers.items():
        torch.testing.assert_close(parts[0].routers[key].sums, router.sums)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_counts_what_a_cpu_counts(made: Path) -> None:
    model, batches = opened(made)
    plain = watched(model, batches)
    there = watched(model.to("cuda"), [{key: value.to("cuda") for key, value in batch.items()} for batch in batches])
    for key, router in plain.routers.items():
        one, two = router.measured(), there.routers[key].measured()
        assert one is not None and two is not None and one.tokens == two.tokens
        assert one.load == pytest.approx(two.load, abs=1e-3)
