"""A router over given LoRAs that is fitted, not trained: prompts are clustered, and each cluster gets its expert.

Source: MixER (github ddrous/mixer): k-means over contexts, each expert's median loss in each cluster, a one-to-one
assignment, and a linear router by least squares. Here a context is the mean of the base's last hidden states over a
prompt; clusters are k-means++'s with Euclid's distance (there L1), and the assignment is the cheapest that swaps find
(there greedy). `prototype` keeps the clusters' centres c_e instead (Arrow's and Uni-RAG's idea): the nearest is the
largest of c_e h - |c_e|^2 / 2, so that one more expert is one more row and those there are stay bit for bit.

What comes out is X-LoRA's layer with one expert a prompt: the router reads the mean of a first pass over the prompt.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from peft import get_peft_model_state_dict
from torch import Tensor

from qd2mora.base import load_base, load_tokenizer
from qd2mora.base.passes import last_states
from qd2mora.composition.calibration import ROWS, parts_of, sampled
from qd2mora.composition.inputs import (
    adapter_folder,
    all_linears,
    check_base,
    is_mixture,
    read_loras,
    read_mixture,
)
from qd2mora.data import Row
from qd2mora.data.prompt_clusters import k_means
from qd2mora.errors import InputRefused
from qd2mora.evaluation import Subject
from qd2mora.evaluation.answering import answer_losses, batch_of
from qd2mora.mixture import MixtureConfig, add_adapter, load_experts, mixture_layers
from qd2mora.mixture.registration import MODEL_PREFIX
from qd2mora.mixture.trained_loras import TrainedLora
from qd2mora.recipe import Recipe

ROUTERS = ("lsq", "prototype")
RIDGE = 1e-3
"""Of least squares, as a share of the contexts' mean square: there are more states than rows."""
_GATE = {"granularity": "sequence", "scope": "block", "select": "top_k", "top_k": 1, "weight": "renorm"}


@dataclass(frozen=True)
class Router:
    """A linear router of prompts: rows (E, H) and biases (E,), float64."""

    rows: Tensor
    bias: Tensor

    @property
    def is_of_prototypes(self) -> bool:
        """Whether its rows are prototypes, so that others may stand beside them."""
        wanted = -self.rows.square().sum(1) / 2
        return bool(torch.allclose(self.bias, wanted, rtol=1e-4, atol=1e-6))

    def choices(self, contexts_NH: Tensor) -> Tensor:
        """Return each context's expert, (N,)."""
        return (contexts_NH @ self.rows.T + self.bias).argmax(1)


@dataclass(frozen=True)
class Fitted:
    """The mixture, and what it does on the rows that it was fitted on: nats a token, and rows by expert.

    single: of the best expert alone; own: were each row given its own best.
    """

    config: MixtureConfig
    tensors: dict[str, Tensor]
    rows: list[int]
    single: float
    routed: float
    own: float


def fit_router(folders: Sequence[str], base: str, recipe: Recipe, kind: str) -> Fitted:
    """Fit a router over adapters of `base`; a mixture fitted before brings its experts, and its prototypes stay.

    Raises InputRefused, DamagedFile.
    """
    if kind not in ROUTERS:
        raise InputRefused(f"--router: '{kind}' will not do: {' or '.join(ROUTERS)}")
    check_base("--on", recipe, base)
    banks = [_read(folder) for folder in folders]
    loras = [lora for experts, _ in banks for lora in experts]
    if len(loras) < 2:
        raise InputRefused("fit-router: one adapter leaves nothing to choose; name several")
    known = banks[0][1] if kind == "prototype" else None
    model = add_adapter(load_base(recipe.base), mixture_of(loras), 0)
    load_experts(mixture_layers(model), loras)
    subject = Subject(model.eval(), load_tokenizer(recipe.base.model))
    rows = sampled(recipe, subject.tokenizer, ROWS)
    contexts = prompt_contexts(subject, rows)
    losses = _expert_losses(subject, rows, len(loras))
    router = _grown(known, folders[0], contexts, len(loras)) if known else fitted(contexts, losses, kind)
    _put(subject, router)
    chosen = router.choices(contexts)
    routed = losses.gather(1, chosen[:, None]).mean()
    return Fitted(
        config=model.peft_config["default"],
        tensors={name.removeprefix(MODEL_PREFIX): each for name, each in get_peft_model_state_dict(model).items()},
        rows=chosen.bincount(minlength=len(loras)).tolist(),
        single=float(losses.mean(0).min()),
        routed=float(routed),
        own=float(losses.amin(1).mean()),
    )


def mixture_of(loras: Sequence[TrainedLora]) -> MixtureConfig:
    """Return the configuration of LoRAs of which a prompt uses one."""
    ranks = [lora.rank for lora in loras]
    return MixtureConfig(
        method="xlora",
        ranks=ranks,
        rank=max(ranks),
        # s = 1: an expert's own scale is in its B, which an expert added later does not change.
        alpha=float(max(ranks)),
        gates={"down": dict(_GATE)},
        down={"experts": len(loras)},
        up={"experts": len(loras)},
        target_modules=all_linears(loras),
        task_type="CAUSAL_LM",
    )


def fitted(contexts_NH: Tensor, losses_NE: Tensor, kind: str, seed: int = 0) -> Router:
    """Return the router of contexts whose clusters each get the expert that does best there, one to one."""
    num = losses_NE.shape[1]
    points: NDArray[np.float64] = contexts_NH.numpy()
    if len(np.unique(points, axis=0)) < num:
        raise InputRefused(f"--on: the recipe's prompts are fewer than {num} different ones: each expert needs its own")
    owner_N = torch.from_numpy(k_means(points, num, np.random.default_rng(seed))[0])
    # Medians, as published: one prompt that every expert fails on does not decide for its cluster.
    medians = torch.stack([losses_NE[owner_N == cluster].median(0).values for cluster in range(num)])
    expert_of = assigned(medians)
    target_N = torch.tensor(expert_of)[owner_N]
    if kind == "prototype":
        return of_prototypes(torch.stack([contexts_NH[target_N == expert].mean(0) for expert in range(num)]))
    return least_squares(contexts_NH, torch.nn.functional.one_hot(target_N, num).double())


def assigned(costs_KE: Tensor) -> list[int]:
    """Return each cluster's expert, one to one, at the least sum of costs that swaps of two find."""
    expert_of = list(range(len(costs_KE)))
    improved = True
    while improved:
        improved = False
        for a in range(len(expert_of)):
            for b in range(a):
                before = costs_KE[a, expert_of[a]] + costs_KE[b, expert_of[b]]
                # By more than rounding, or two that cost the same would change places for ever.
                if costs_KE[a, expert_of[b]] + costs_KE[b, expert_of[a]] < before - 1e-12:
                    expert_of[a], expert_of[b] = expert_of[b], expert_of[a]
                    improved = True
    return expert_of


def least_squares(contexts_NH: Tensor, target_NE: Tensor) -> Router:
    """Return W, b with W c + b nearest to the targets, by ridge regression through the mean."""
    mean, center = contexts_NH.mean(0), target_NE.mean(0)
    c = contexts_NH - mean
    # In the space of rows, N x N, where states are more than rows.
    kernel = c @ c.T
    ridge = RIDGE * kernel.diagonal().mean() * torch.eye(len(c), dtype=c.dtype)
    rows = (c.T @ torch.linalg.solve(kernel + ridge, target_NE - center)).T
    return Router(rows, center - rows @ mean)


def of_prototypes(prototypes_EH: Tensor) -> Router:
    """Return the router to the nearest prototype."""
    # Largest c h - |c|^2 / 2 is least |h - c|^2, as |h|^2 is the same for all: a nearest centre as a linear router.
    return Router(prototypes_EH, -prototypes_EH.square().sum(1) / 2)


@torch.no_grad()
def prompt_contexts(subject: Subject, rows: Sequence[Row]) -> Tensor:
    """Return the mean of the base's last hidden states over each row's prompt, (rows, hidden) float64 on the CPU."""
    prompts = [Row(row.task, row.ids[: max(1, row.masked)], max(1, row.masked), row.pair) for row in rows]
    found = []
    for part in parts_of(prompts):
        batch = batch_of(subject, part, "right")
        with subject.without_adapter() if subject.is_adapted else nullcontext():
            states = last_states(subject.plain, batch).float()
        mask = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
        found.append((states * mask).sum(1) / mask.sum(1))
    return torch.cat(found).double().cpu()


def _grown(known: Router, folder: str, contexts_NH: Tensor, num: int) -> Router:
    """Return a router's prototypes and one more, the mean of these contexts."""
    if num - len(known.rows) != 1:
        raise InputRefused("fit-router: a bank of prototypes grows by one adapter at a time, on that one's own rows")
    if not known.is_of_prototypes:
        raise InputRefused(
            f"fit-router: the router of '{folder}' was fitted by least squares, and its rows are no prototypes; fit it "
            "anew on the rows of all, or with --router lsq"
        )
    added = of_prototypes(contexts_NH.mean(0, keepdim=True))
    return Router(torch.cat([known.rows, added.rows]), torch.cat([known.bias, added.bias]))


def _expert_losses(subject: Subject, rows: Sequence[Row], num: int) -> Tensor:
    """Return each expert's loss on each row, (rows, experts) float64, nats a token of the answer."""
    hidden = int(subject.plain.config.hidden_size)
    columns = []
    for expert in range(num):
        # A router whose bias alone speaks: the whole mixture is this expert.
        bias = torch.nn.functional.one_hot(torch.tensor(expert), num).double()
        _put(subject, Router(torch.zeros(num, hidden, dtype=torch.float64), bias))
        found = [loss for part in parts_of(list(rows)) for loss in answer_losses(subject, part)]
        columns.append([loss / row.num_labels for loss, row in zip(found, rows, strict=True)])
    return torch.tensor(columns, dtype=torch.float64).T


def _put(subject: Subject, router: Router) -> None:
    """Give every block of a model this router."""
    for layer in mixture_layers(subject.model).values():
        tensors = layer.tensors("default")
        if "mixture_router_down" in tensors:
            with torch.no_grad():
                tensors["mixture_router_down"].copy_(router.rows)
                tensors["mixture_bias_down"].copy_(router.bias)


def _read(folder: str) -> tuple[list[TrainedLora], Router | None]:
    """Return the experts of an adapter, and its router where it was fitted before. Raises InputRefused."""
    if not is_mixture(folder):
        return read_loras([folder]), None
    config, linears = read_mixture(folder)
    if config.method != "xlora" or (config.gates or {}).get("down") != _GATE or not config.num_down:
        raise InputRefused(f"fit-router: '{folder}' is a {config.method} with a router of its own; LoRAs are taken")
    ranks = config.ranks or [config.rank or 0] * config.num_down
    experts = []
    for number, rank in enumerate(ranks):
        pairs = {name: _pair(tensors, ranks, number) for name, tensors in linears.items()}
        experts.append(TrainedLora(adapter_folder(folder), rank, config.scaling, pairs))
    owner = next(tensors for tensors in linears.values() if "mixture_router_down" in tensors)
    return experts, Router(owner["mixture_router_down"].double(), owner["mixture_bias_down"].double())


def _pair(tensors: dict[str, Tensor], ranks: Sequence[int], number: int) -> tuple[Tensor, Tensor]:
    A, B = tensors["mixture_A"], tensors["mixture_B"]
    if A.dim() == 3:
        return A[number], B[number]
    start = sum(ranks[:number])
    return A[start : start + ranks[number]], B[:, start : start + ranks[number]]


__all__ = [
    "ROUTERS",
    "Fitted",
    "Router",
    "assigned",
    "fit_router",
    "fitted",
    "least_squares",
    "of_prototypes",
    "prompt_contexts",
]
