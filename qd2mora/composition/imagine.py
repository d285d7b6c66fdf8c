"""Cores for a task that nothing was trained on, from its prompts: a conditional autoencoder over other tasks' cores.

Experimental. Source: ICM-LoRA (arXiv 2501.17635; github YihuaJerry/ICM-LoRA): a conditional variational autoencoder
over the weights of adapters, conditioned on a task vector, with the loss MSE + 0.005 KL. Adapters here share all but
their cores (`train.stages: [{train: cores}]` over one `adapter.start`), which are few numbers; a task vector is the
mean of the base's last hidden states over prompts of the task.

Deviations: convolutions over whole LoRAs become a small network over coordinates of the cores' own span, of which N
tasks have N - 1, and so do task vectors; the decoder has a linear way from the task vector; there is one core a task
where the authors keep checkpoints; and what comes out is the prior's mean (z = 0), no draw.

Shapes: N tasks, H hidden states, F all cores' entries, P and Q coordinates of task vectors and cores.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qd2mora.base import load_base, load_tokenizer
from qd2mora.composition.calibration import ROWS, sampled
from qd2mora.composition.fit_router import prompt_contexts
from qd2mora.composition.inputs import check_base, read_mixture
from qd2mora.errors import InputRefused
from qd2mora.evaluation import Subject
from qd2mora.mixture import MixtureConfig
from qd2mora.recipe import Recipe
from qd2mora.run_folder import is_run, read_recipe

CORE = "mixture_core"
FEWEST = 3
KL_WEIGHT, LATENT, WIDTH = 0.005, 4, 32
STEPS, RATE = 500, 2e-2
DECAY = 1.0
"""Of the networks, not of the linear way: few tasks are to be told apart by that first."""
KEPT = 1e-6
"""Directions whose singular value is a smaller share of the largest are rounding, no coordinates."""


@dataclass(frozen=True)
class Imagined:
    """An adapter with cores that were made.

    error: how far the given tasks' cores come back, over how far they lie from their mean; nearest: the given task
    whose vector is nearest; outside: the share of the new vector's distance from the mean that no given task spans.
    """

    config: MixtureConfig
    tensors: dict[str, Tensor]
    error: float
    nearest: str
    outside: float


def imagine(folders: Sequence[str], base: str, recipe: Recipe) -> Imagined:
    """Make cores for a recipe's rows from runs that share all but their cores. Raises InputRefused, DamagedFile."""
    if len(folders) < FEWEST:
        raise InputRefused(f"imagine: {len(folders)} tasks show nothing of how cores follow a task; {FEWEST} or more")
    check_base("--on", recipe, base)
    for folder in folders:
        if not is_run(folder):
            raise InputRefused(f"imagine: '{folder}' is no run, whose rows would tell its task")
    config, linears = read_mixture(folders[0])
    cores_NF = torch.stack([_cores(read_mixture(folder)[1], linears, folders[0], folder) for folder in folders])
    subject = Subject(load_base(recipe.base).eval(), load_tokenizer(recipe.base.model))
    tasks_NH = torch.stack([task_vector(subject, read_recipe(folder)) for folder in folders])
    asked_H = task_vector(subject, recipe)
    network = CoreNetwork.fitted(tasks_NH, cores_NF)
    made = _written(network.imagined(asked_H), linears)
    return Imagined(
        config=config,
        tensors={f"{name}.{kind}": tensor for name, each in made.items() for kind, tensor in each.items()},
        error=network.error(tasks_NH, cores_NF),
        nearest=folders[int((tasks_NH - asked_H).norm(dim=1).argmin())],
        outside=network.tasks.outside(asked_H),
    )


def task_vector(subject: Subject, recipe: Recipe) -> Tensor:
    """Return the mean of the base's last hidden states over prompts of a recipe's rows, (H,) float64."""
    return prompt_contexts(subject, sampled(recipe, subject.tokenizer, ROWS)).mean(0)


@dataclass(frozen=True)
class Span:
    """Coordinates of vectors among the given ones: their mean, orthonormal directions (rows), one scale for all."""

    mean: Tensor
    directions: Tensor
    scale: float

    @classmethod
    def of(cls, vectors_NF: Tensor) -> "Span":
        """Return the span of vectors (N, F), their coordinates of size one on average."""
        mean = vectors_NF.mean(0)
        _, values, right = torch.linalg.svd(vectors_NF - mean, full_matrices=False)
        kept = values > KEPT * values[0].clamp_min(1e-300)
        scale = float((values.square().sum() / max(1, len(vectors_NF) * int(kept.sum()))).sqrt())
        return cls(mean, right[kept], scale or 1.0)

    def coordinates(self, vectors: Tensor) -> Tensor:
        """Return coordinates (..., P) of vectors (..., F)."""
        return (vectors - self.mean) @ self.directions.T / self.scale

    def vectors(self, coordinates: Tensor) -> Tensor:
        """Return the inverse of `coordinates`, of vectors in the span."""
        return self.mean + self.scale * coordinates @ self.directions

    def outside(self, vector: Tensor) -> float:
        """Return the share of a vector's distance from the mean that lies outside of the span, 0 to 1."""
        whole = float((vector - self.mean).norm())
        return float((vector - self.vectors(self.coordinates(vector))).norm()) / whole if whole else 0.0


class CoreNetwork(nn.Module):
    """The autoencoder: q(z | core, task) and a decoder of z and the task, in coordinates, float64."""

    def __init__(self, tasks: Span, cores: Span) -> None:
        super().__init__()
        self.tasks, self.cores = tasks, cores
        num_tasks, num_cores = len(tasks.directions), len(cores.directions)
        self.encoder = nn.Sequential(
            nn.Linear(num_tasks + num_cores, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 2 * LATENT)
        ).double()
        self.decoder = nn.Sequential(
            nn.Linear(num_tasks + LATENT, WIDTH), nn.Tanh(), nn.Linear(WIDTH, num_cores)
        ).double()
        self.along = nn.Linear(num_tasks, num_cores, bias=False).double()
        # The network begins as the mean core, so that what it learns is how cores differ.
        for tensor in (self.along.weight, *self.decoder[2].parameters(), *self.encoder[2].parameters()):
            nn.init.zeros_(tensor)

    @classmethod
    def fitted(cls, tasks_NH: Tensor, cores_NF: Tensor, seed: int = 0) -> "CoreNetwork":
        """Return the network of these tasks' vectors and cores; the same ones give the same."""
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = cls(Span.of(tasks_NH), Span.of(cores_NF))
        c_NP, x_NQ = network.tasks.coordinates(tasks_NH), network.cores.coordinates(cores_NF)
        networks = [*network.encoder.parameters(), *network.decoder.parameters()]
        kinds = [{"params": [network.along.weight], "weight_decay": 0.0}, {"params": networks, "weight_decay": DECAY}]
        steps = torch.optim.AdamW(kinds, lr=RATE)
        course = torch.optim.lr_scheduler.CosineAnnealingLR(steps, STEPS)
        with torch.enable_grad():
            for _ in range(STEPS):
                steps.zero_grad()
                network.loss(c_NP, x_NQ, generator).backward()
                steps.step()
                course.step()
        return network

    def loss(self, c_NP: Tensor, x_NQ: Tensor, generator: torch.Generator) -> Tensor:
        """Return MSE + KL_WEIGHT KL(q || N(0, I)), the latter a mean over tasks; z is drawn once a task."""
        mean, log_variance = self.encoder(torch.cat([c_NP, x_NQ], -1)).chunk(2, -1)
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype)
        found = self.decoded(c_NP, mean + noise * (log_variance / 2).exp())
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1).mean() / 2
        return (found - x_NQ).square().mean() + KL_WEIGHT * divergence

    def decoded(self, c: Tensor, z: Tensor) -> Tensor:
        """Return cores' coordinates (..., Q) of task vectors' (..., P) and z (..., LATENT)."""
        coordinates: Tensor = self.along(c) + self.decoder(torch.cat([c, z], -1))
        return coordinates

    @torch.no_grad()
    def imagined(self, tasks: Tensor) -> Tensor:
        """Return cores (..., F) for task vectors (..., H), at z = 0."""
        c = self.tasks.coordinates(tasks)
        return self.cores.vectors(self.decoded(c, c.new_zeros(*c.shape[:-1], LATENT)))

    def error(self, tasks_NH: Tensor, cores_NF: Tensor) -> float:
        """Return how far cores come back, over how far they lie from their mean; 0 where all are alike."""
        spread = float((cores_NF - self.cores.mean).norm())
        return float((self.imagined(tasks_NH) - cores_NF).norm()) / spread if spread else 0.0


Linears = dict[str, dict[str, Tensor]]


def _cores(linears: Linears, first: Linears, first_name: str, name: str) -> Tensor:
    """Return an adapter's cores as one vector (F,), float64. Raises InputRefused where more than cores differs."""
    found = []
    for linear, tensors in first.items():
        other = linears.get(linear, {})
        if CORE not in tensors:
            raise InputRefused(f"imagine: '{first_name}' has no cores in {linear}; moslora and comol do")
        if other.keys() != tensors.keys() or linears.keys() != first.keys():
            raise InputRefused(
                f"imagine: '{name}' has other tensors than '{first_name}'; one adapter.start gives the same"
            )
        for kind, tensor in tensors.items():
            if other[kind].shape != tensor.shape or (kind != CORE and not torch.equal(other[kind], tensor)):
                raise InputRefused(
                    f"imagine: {linear}.{kind} of '{name}' is not that of '{first_name}': train cores alone over one "
                    "adapter.start, train.stages=[{train: cores}]"
                )
        found.append(other[CORE].double().flatten())
    return torch.cat(found)


def _written(cores_F: Tensor, linears: Linears) -> Linears:
    """Return an adapter's tensors with other cores."""
    made: Linears = {}
    start = 0
    for linear, tensors in linears.items():
        size = tensors[CORE].numel()
        core = cores_F[start : start + size].view(tensors[CORE].shape).to(tensors[CORE].dtype)
        made[linear], start = tensors | {CORE: core}, start + size
    return made


__all__ = ["CoreNetwork", "Imagined", "Span", "imagine", "task_vector"]
