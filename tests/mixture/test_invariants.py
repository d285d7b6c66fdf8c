"""What must hold of each method whatever its numbers are: it is another method where it should be, or the base."""

import made
import pytest
import torch
from torch import Tensor

from qd2mora.mixture import MixtureLinear
from qd2mora.mixture.initialisers import initial_tensor
from qd2mora.mixture.presets import METHODS
from qd2mora.mixture.spec import Place, linear_spec
from qd2mora.routed.ops import kron_banks

CLOSE = {"rtol": 1e-9, "atol": 1e-11}  # float64 sums in another order


def update_of(layer: MixtureLinear, x: Tensor) -> Tensor:
    """What the adapter adds, divided by its scale."""
    y = layer.base_layer(x)
    if "mixture_base_scale" in layer.tensors("default"):
        y = layer.base_scaled(y, "default")
    return (layer(x) - y) / layer.scaling("default")


def plain(A_RD: Tensor, B_OR: Tensor, x: Tensor) -> Tensor:
    return x @ A_RD.T @ B_OR.T


def stacked(layer: MixtureLinear) -> tuple[Tensor, Tensor]:
    """All experts as one LoRA of their summed rank."""
    return layer.rows("default"), layer.columns("default")


def first(layer: MixtureLinear) -> tuple[Tensor, Tensor]:
    tensors = layer.tensors("default")
    return tensors["mixture_A"][0], tensors["mixture_B"][0]


ONE = {"experts": 1}
TO_ONE = [name for name in made.NAMES if METHODS[name].pairing == "tied" and name != "ept"]


@pytest.mark.parametrize("method", [*TO_ONE, "d2mora", "hydralora"])
def test_one_expert_is_plain_lora(method: str) -> None:
    changes: dict[str, object] = {"down": ONE, "up": ONE}
    if method == "peam":
        changes["num_tasks"] = 1
    layer = made.layer_of(method, **changes)
    tensors, x = layer.tensors("default"), made.input_for(method)
    wanted = plain(*first(layer), x)
    if method == "peam":
        layer.routing.task_index = torch.zeros(3, dtype=torch.long)
    elif method == "clora":
        layer.routing.marks = torch.ones(3, 5, dtype=torch.long)
    elif method == "scalezero":
        wanted = wanted * (1 + 0.2 * tensors["mixture_logits_down"].tanh())
    elif method == "base_gate":
        tensors["mixture_bias_down"].data.fill_(60.0)  # a sigmoid of one
    torch.testing.assert_close(update_of(layer, x), wanted, **CLOSE)


@pytest.mark.parametrize(("method", "scale"), [("smora", 1.0), ("flylora", 1.0), ("mora", 5.0)])
def test_a_rank_gate_that_keeps_every_rank_is_plain_lora(method: str, scale: float) -> None:
    """MoRA's softmax over five ranks is a fifth each once its temperature is high; SMoRA's equal sigmoids count one."""
    gate = {"top_k": 5} | ({"temperature": 1e12} if method == "mora" else {})
    layer = made.layer_of(method, gates={"rank": gate})
    if method == "smora":
        for name in ("mixture_router_rank", "mixture_select_bias_rank"):
            layer.tensors("default")[name].data.zero_()
    x = made.input_for(method)
    torch.testing.assert_close(scale * update_of(layer, x), plain(*first(layer), x), **CLOSE)


@pytest.mark.parametrize("method", ["residual_cores", "residual_scales"])
@pytest.mark.parametrize("init", [True, False])
def test_a_residual_form_is_plain_lora_at_its_start_and_wherever_its_cores_are_zero(method: str, init: bool) -> None:
    layer = made.layer_of(method)
    core = layer.tensors("default")["mixture_core"]
    if init:
        spec = layer.mixture_spec["default"]
        core.data.copy_(initial_tensor("mixture_core", core.shape, layer.mixture_config["default"], spec))
    else:
        core.data.zero_()
    x = made.input_for(method)
    torch.testing.assert_close(update_of(layer, x), plain(*first(layer), x), **CLOSE)
    layer.double().train()
    core.requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), core)
    assert (gradient.flatten(1).norm(dim=1) > 0).all()  # routing can begin to learn from there


@pytest.mark.parametrize(("method", "shape"), [("residual_cores", (2, 3, 3)), ("residual_scales", (2, 3))])
def test_a_recipe_says_how_many_cores_there_are(method: str, shape: tuple[int, ...]) -> None:
    layer = made.layer_of(method, core={"experts": 2})
    assert layer.tensors("default")["mixture_core"].shape == shape
    assert layer.tensors("default")["mixture_router_core"].shape == (2, 3)


@pytest.mark.parametrize("method", ["loramoe", "mola", "dynmole", "moelora", "sketchassist", "reclora", "xlora", "cat"])
def test_equal_experts_under_gates_that_sum_to_one_are_one_lora(method: str) -> None:
    layer = made.layer_of(method, **({"gates": {"down": {"entropy_limit": 0.0}}} if method == "dynmole" else {}))
    for name in ("mixture_A", "mixture_B"):
        bank = layer.tensors("default")[name]
        bank.data.copy_(bank.data[:1].clone().expand_as(bank))
    x = made.input_for(method)
    torch.testing.assert_close(update_of(layer, x), plain(*first(layer), x), **CLOSE)


def test_paired_experts_are_one_lora_of_all_their_ranks_under_a_gate_of_blocks() -> None:
    """SMoRA's claim: K is diagonal, a block of equal entries for each expert."""
    layer = made.layer_of("loramoe")
    x = made.input_for("loramoe")
    K = layer.mixing(x, "default")
    gates = torch.softmax(x @ layer.tensors("default")["mixture_router_down"].T, -1)
    blocks = torch.diag_embed(gates.repeat_interleave(made.RANK, -1))
    torch.testing.assert_close(K, blocks, **CLOSE)
    A, B = stacked(layer)
    torch.testing.assert_close(update_of(layer, x), (x @ A.T * blocks.diagonal(dim1=-2, dim2=-1)) @ B.T, **CLOSE)


@pytest.mark.parametrize("method", made.NAMES)
def test_the_mixing_matrix_is_what_the_layer_does(method: str) -> None:
    """B K_t A x token by token: the statistics and the exports rest on K alone."""
    layer = made.layer_of(method)
    x = made.input_for(method)
    A, B = stacked(layer)
    K = layer.mixing(x, "default")
    wanted = torch.einsum("oq,btqp,pd,btd->bto", B, K, A, x)
    torch.testing.assert_close(update_of(layer, x), wanted, **CLOSE)


@pytest.mark.parametrize(("method", "rank"), [("d2mora", 3), ("hydralora", 3), ("comol", 3), ("loramoe", 7)])
def test_a_chains_update_has_the_rank_of_one_expert_and_a_paired_ones_of_all(method: str, rank: int) -> None:
    layer = made.layer_of(method)
    A, B = stacked(layer)
    K = layer.mixing(made.input_for(method), "default")
    # Four paired experts of rank 3 fill all seven outputs.
    assert (torch.linalg.matrix_rank(B @ K @ A) == rank).all()


def test_hydralora_is_d2mora_of_one_down_expert_whose_up_router_reads_x() -> None:
    hydra = made.layer_of("hydralora")
    other = made.layer_of("d2mora", down=ONE, gates={"up": {"input": "x"}})
    for name, tensor in hydra.tensors("default").items():
        other.tensors("default")[name].data.copy_(tensor)
    x = made.input_for("hydralora")
    assert torch.equal(hydra(x), other(x))


def test_cores_fold_into_the_down_expert_and_unit_cores_are_plain_lora() -> None:
    moslora, x = made.layer_of("moslora"), made.input_for("moslora")
    A, B = first(moslora)
    core = moslora.tensors("default")["mixture_core"]
    torch.testing.assert_close(update_of(moslora, x), plain(core @ A, B, x), **CLOSE)
    for method in ("moslora", "comol", "mofme"):
        layer = made.layer_of(method)
        core = layer.tensors("default")["mixture_core"]
        core.data.copy_(torch.ones_like(core) if method == "mofme" else torch.eye(made.RANK).expand_as(core))
        torch.testing.assert_close(update_of(layer, x), plain(*first(layer), x), **CLOSE)


def test_comol_is_hydralora_with_up_experts_that_carry_the_transposed_cores() -> None:
    comol, x = made.layer_of("comol"), made.input_for("comol")
    hydra = made.layer_of("hydralora", up={"experts": 8}, gates={"up": {"input": "z"}})
    mine, others = comol.tensors("default"), hydra.tensors("default")
    others["mixture_A"].data.copy_(mine["mixture_A"])
    others["mixture_B"].data.copy_(mine["mixture_B"][0] @ mine["mixture_core"].mT)
    others["mixture_router_up"].data.copy_(mine["mixture_router_core"])
    torch.testing.assert_close(update_of(comol, x), update_of(hydra, x), **CLOSE)


def test_ept_starts_at_its_base_because_its_kernels_are_zero_and_its_seed_is_not() -> None:
    place, config = Place("model.layers.0.mlp.gate_proj", 50, 70), made.config_of("ept", rank=8)
    spec = linear_spec(config, place)
    starts = {name: initial_tensor(name, shape, config, spec) for name, shape in spec.shapes.items()}
    assert not starts["mixture_core"].any()
    for bank in ("mixture_A", "mixture_B"):
        assert abs(starts[bank].std() * 8 - 1) < 5 / (2 * starts[bank].numel()) ** 0.5


@pytest.mark.parametrize("scale", [1, 2, 4, 6])
def test_epts_banks_unfold_to_the_kronecker_product_cut_to_the_linears_size(scale: int) -> None:
    A, B, kernel = torch.randn(3, 13).double(), torch.randn(8, 3).double(), torch.randn(scale, scale).double()
    rows, columns = kron_banks(A, B, (scale,))
    ours = columns @ torch.kron(torch.eye(3).double(), kernel) @ rows
    seed = (B @ A)[: -(-8 // scale), : -(-13 // scale)]
    torch.testing.assert_close(ours, torch.kron(seed, kernel)[:8, :13], **CLOSE)


@pytest.mark.parametrize("method", ["moelora", "ept", "peam", "reclora"])
def test_an_update_that_depends_on_the_row_alone_folds_into_a_weight_exactly(method: str) -> None:
    layer, x = made.layer_of(method), made.input_for(method)
    A, B = stacked(layer)
    K = layer.mixing(x[:, :1], "default")[:, 0]
    for row in range(made.ROWS):
        torch.testing.assert_close(update_of(layer, x)[row], x[row] @ (B @ K[row] @ A).T, **CLOSE)


@pytest.mark.parametrize("method", ["moelora", "ept", "peam", "sketchassist"])
def test_tasks_answer_by_task_and_permuting_them_permutes_the_answers(method: str) -> None:
    layer, x = made.layer_of(method), made.input_for(method)[:1].expand(3, -1, -1)
    layer.routing.task_index = torch.tensor([0, 1, 2])
    straight = layer(x)
    layer.routing.task_index = torch.tensor([2, 0, 1])
    torch.testing.assert_close(layer(x), straight[[2, 0, 1]], **CLOSE)
    assert not torch.allclose(straight[0], straight[1])
    if method != "peam":
        table = layer.tensors("default")["mixture_task_embedding"]
        table.data.copy_(table.data[:1].clone().expand_as(table))
        torch.testing.assert_close(layer(x)[0], layer(x)[1], **CLOSE)


def test_two_rows_with_one_vector_have_one_answer() -> None:
    layer, x = made.layer_of("reclora"), made.input_for("reclora")[:1].expand(3, -1, -1)
    vector = layer.routing.external
    assert not torch.allclose(layer(x)[0], layer(x)[1])
    layer.routing.external = vector[:1].expand(3, -1)
    torch.testing.assert_close(layer(x)[0], layer(x)[1], **CLOSE)


def test_without_a_task_embedding_sketchassist_is_a_token_router() -> None:
    layer, x = made.layer_of("sketchassist"), made.input_for("sketchassist")
    other = made.layer_of("loramoe")
    layer.tensors("default")["mixture_task_embedding"].data.zero_()
    for name, tensor in other.tensors("default").items():
        tensor.data.copy_(layer.tensors("default")[name])
    torch.testing.assert_close(layer(x), other(x), **CLOSE)


def test_training_one_tasks_expert_leaves_every_other_bit_for_bit() -> None:
    layer, x = made.layer_of("peam").train(), made.input_for("peam")
    layer.routing.task_index = torch.tensor([1, 1, 1])
    layer(x).square().sum().backward()
    for name in ("mixture_A", "mixture_B"):
        gradient = layer.tensors("default")[name].grad
        assert gradient[1].any() and not gradient[[0, 2, 3]].any()


@pytest.mark.parametrize(("weight", "learns"), [("one", False), ("straight_through", True), ("softmax", True)])
def test_a_router_of_weight_one_learns_from_its_balance_loss_alone(weight: str, learns: bool) -> None:
    for penalty in (0.0, 0.1):
        layer = made.layer_of("llava_mole", gates={"down": {"weight": weight}}, penalties={"lb_llava": penalty}).train()
        layer(made.input_for("llava_mole")).sum().backward()
        gradient = layer.tensors("default")["mixture_router_down"].grad
        moved = gradient is not None and bool(gradient.any())
        assert moved == (learns or penalty > 0)


def test_a_closed_base_gate_is_the_base_and_an_open_one_is_lora() -> None:
    layer, x = made.layer_of("base_gate"), made.input_for("base_gate")
    bias = layer.tensors("default")["mixture_bias_down"]
    bias.data.fill_(-1e9)
    assert torch.equal(layer(x), layer.base_layer(x))
    bias.data.fill_(1e9)
    torch.testing.assert_close(update_of(layer, x), plain(*first(layer), x), **CLOSE)


def test_the_scale_of_a_base_is_bounded_and_trained() -> None:
    layer, x = made.layer_of("scalezero").train(), made.input_for("scalezero")
    layer(x).square().sum().backward()
    assert layer.tensors("default")["mixture_base_scale"].grad.any()
    for value in (-1e3, 1e3):
        layer.tensors("default")["mixture_base_scale"].data.fill_(value)
        ratio = layer.base_scaled(layer.base_layer(x), "default") / layer.base_layer(x)
        torch.testing.assert_close(ratio, torch.full_like(ratio, 1 + 0.2 * (1 if value > 0 else -1)), **CLOSE)


def test_a_self_activated_gate_does_not_change_with_the_size_of_x() -> None:
    layer, x = made.layer_of("mora"), made.input_for("mora")
    for size in (1e-8, 1e8):
        torch.testing.assert_close(layer.mixing(size * x, "default"), layer.mixing(x, "default"), **CLOSE)


def test_pruning_a_rank_changes_only_the_tokens_that_use_it() -> None:
    layer, x = made.layer_of("mora"), made.input_for("mora")
    before = layer(x)
    uses = layer.mixing(x, "default")[..., 0, 0] > 0
    layer.tensors("default")["mixture_B"].data[..., 0] = 0
    assert uses.any() and not uses.all()
    assert torch.equal((layer(x) != before).any(-1), uses)


@pytest.mark.parametrize("temperature", [1e-9, 1.0])
def test_a_cold_gate_chooses_one_expert(temperature: float) -> None:
    layer, x = made.layer_of("xlora", gates={"down": {"temperature": temperature}}), made.input_for("xlora")
    K = layer.mixing(x, "default").diagonal(dim1=-2, dim2=-1)
    is_one_hot = bool(((K - 0).abs() < 1e-9).logical_or((K - 1).abs() < 1e-9).all())
    assert is_one_hot == (temperature < 1)


def test_the_average_of_adapters_over_one_frozen_sparse_down_expert_is_the_average_of_their_updates() -> None:
    layers = [made.layer_of("flylora", gates={"rank": {"top_k": 5}}) for _ in range(2)]
    torch.nn.init.normal_(layers[1].tensors("default")["mixture_B"])
    x = made.input_for("flylora")
    mean = sum(update_of(layer, x) for layer in layers) / 2
    both = [layer.tensors("default")["mixture_B"].data for layer in layers]
    layers[0].tensors("default")["mixture_B"].data.copy_(sum(both) / 2)
    torch.testing.assert_close(update_of(layers[0], x), mean, **CLOSE)


def test_signed_and_unsigned_selection_differ_so_that_flyloras_choice_is_tested() -> None:
    layer, x = made.layer_of("flylora"), made.input_for("flylora")
    tensors = layer.tensors("default")
    u = x @ tensors["mixture_A"][0].T + tensors["mixture_select_bias_rank"]
    assert not torch.equal(u.topk(2, -1).indices.sort().values, u.abs().topk(2, -1).indices.sort().values)


FROZEN = {"flylora": {"mixture_A", "mixture_select_bias_rank"}, "smora": {"mixture_select_bias_rank"}}
FROZEN |= {name: {"mixture_A", "mixture_B"} for name in ("cat", "xlora")}


@pytest.mark.parametrize("method", made.NAMES)
def test_frozen_tensors_get_no_gradient_and_all_others_do(method: str) -> None:
    layer = made.layer_of(method, penalties=None).train()
    layer.requires_grad_(True)
    layer.set_adapter("default")
    layer(made.input_for(method)).square().sum().backward()
    without = {name for name, tensor in layer.tensors("default").items() if tensor.grad is None}
    assert without == FROZEN.get(method, set())


def test_a_frozen_sparse_down_expert_has_the_published_number_of_entries_and_size() -> None:
    layer = MixtureLinear(
        torch.nn.Linear(400, 3),
        "default",
        made.config_of("flylora", rank=32, gates={"rank": {"top_k": 8}}),
        made.routing_for_rows(),
    )
    A = layer.tensors("default")["mixture_A"][0]
    assert ((A != 0).sum(-1) == 400 * 8 // 32).all()
    # 3,200 normal numbers of deviation 1 / 32: five deviations of their own deviation.
    assert abs(A[A != 0].std() * 32 - 1) < 5 / (2 * 3200) ** 0.5


@pytest.mark.parametrize(("method", "std"), [("moelora", 0.01), ("scalezero", 0.01), ("noisy_top_k", 1 / 16)])
def test_gaussian_down_experts_have_the_published_size(method: str, std: float) -> None:
    base = torch.nn.Linear(300, 300)
    layer = MixtureLinear(base, "default", made.config_of(method, rank=16), made.routing_for_rows())
    A = layer.tensors("default")["mixture_A"]
    assert abs(A.std() / std - 1) < 5 / (2 * A.numel()) ** 0.5
