"""The recipe's train and finish sections: how it is learned, and what happens then."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from qd2mora.recipe.optimizers import OptimizerName
from qd2mora.recipe.section import MOST, Count, Epochs, Fraction, NotNegative, Positive, Section, Size, Whole

# Keys of `train` that leave the trained weights as they are.
HARMLESS = (
    *("save_every", "eval_every", "keep_checkpoints", "keep_best"),
    *("log_every", "trackers", "micro_batch", "time_limit", "deterministic"),
)

_TIME_UNITS = {"s": 1, "min": 60, "h": 3600}


class Rates(Section):
    """Learning rates of an adapter's parts, as multiples of `learning_rate`; `up: 16` is LoRA+ (arXiv 2402.12354)."""

    down: Positive = 1.0
    """Of down experts (A), the shared one too."""
    up: Positive = 1.0
    """Of up experts (B), the shared one too."""
    core: Positive = 1.0
    """Of what lies between them, where a method has it."""
    router: Positive = 1.0
    """Of routers, with their biases, second layers, static weights and task embeddings."""


class LearnedRouting(Section):
    """How routing changes while it is learned. Gates of an adapter that is evaluated or used are its own throughout."""

    uniform_steps: Whole = 0
    """Steps at first in which all experts count alike, so that routers do not choose among what has not learned."""
    temperature: Positive = 1.0
    """What the gates' temperatures are multiplied with at first; above 1 routing begins soft."""
    anneal_steps: Whole = 0
    """Steps in which that falls to 1, in equal ratios."""
    draws: Annotated[int, Field(ge=2, le=1024)] = 4
    """Draws of each row's experts for the gradient of a router that samples (`remix`, or `select: sample` of any gate);
    each runs the model anew."""
    estimator: Literal["rloo", "grpo"] = "rloo"
    """How a router that samples learns of a row's draws: `rloo`, by how much lower each one's loss is than the mean of
    the others (ReMix); `grpo`, by that in standard deviations of the row's own draws (MoE-GRPO)."""
    penalty_steps: Whole = 0
    """Steps in which weights of penalties on routing rise from zero: with `entropy`, gates become decided slowly."""

    top_k: Size | None = None
    """Experts that gates with `select: top_k` use at first: more than their own number, to which it falls (8, where
    they end at 2)."""
    top_k_steps: Whole = 0
    """Steps in which it falls, in equal parts; `max_load` in `metrics.jsonl` is the load of the worst router."""
    low_layers_later: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """How much later it falls in the lowest layer, in multiples of `top_k_steps`; in layers between in proportion."""

    @model_validator(mode="after")
    def _falls(self) -> "LearnedRouting":
        if (self.top_k is not None) != (self.top_k_steps > 0):
            raise ValueError("top_k and top_k_steps go together: how many experts are used at first, and for how long")
        if self.low_layers_later and self.top_k is None:
            raise ValueError("low_layers_later goes with top_k and top_k_steps: it says where that falls later")
        if (self.temperature != 1.0) != (self.anneal_steps > 0):
            raise ValueError("temperature and anneal_steps go together: how soft routing begins, and for how long")
        return self


class Stage(Section):
    """Steps in which a part of the adapter is trained; the rest keeps its bits."""

    train: Literal["experts", "cores", "routers", "all"]
    """`experts`: all but the routers; `cores`: what lies between down and up alone, where a method has it (`moslora`,
    `comol`); `routers`: with their biases, static weights and task embeddings; `all`."""
    steps: Count | None = None
    """How many; stages that leave it out share what is left of the run, in equal parts."""


class Growth(Section):
    """When the next expert opens, or the next ranks where ranks are gated (`mora`, `smora`, `flylora`)."""

    patience: Count = 2
    """Evaluations in a row in which a task's held-out loss is to rest; each task that does opens one expert, or as many
    ranks as open at a time."""
    gain: Fraction = 0.01
    """The share of its best loss that a loss has to fall by, not to rest."""
    ranks: Count | None = None
    """Of gated ranks: how many open at a time; as many as a token uses (its gate's `top_k`) where left out."""


class Train(Section):
    """How it is learned."""

    steps: Count | None = None
    """Optimiser steps; one of `steps`, `epochs` and `data.stop` ends a run."""
    epochs: Epochs | None = None
    """How often the rows are gone through."""
    micro_batch: Size | Literal["auto"] = "auto"
    """Rows in one forward pass; the result does not depend on it."""
    global_batch: Size = 16
    """Rows in one optimiser step."""
    learning_rate: Positive = 3e-4
    """The largest one, after the warmup."""
    rates: Rates | None = None
    """Other rates for experts and routers; one for all where left out."""
    routing: LearnedRouting | None = None
    """How gates and their penalties change at first; as they are from the first step on where left out."""
    stages: Annotated[list[Stage], Field(min_length=1)] | None = None
    """Which part of the adapter is trained in which steps, one stage after another; all in all where left out."""
    growth: Growth | None = None
    """Open experts or ranks when held-out losses come to rest; where left out all are open, but of `scalezero`, which
    opens its experts in equal parts of the run."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls to zero, or that it does not."""
    warmup_steps: Whole = 0
    """Steps in which the learning rate rises from zero."""
    optimizer: Literal["auto", OptimizerName] = "adamw"
    """`auto`: adamw where the budget allows it, else adamw_8bit; decided before step 1 and then part of the run."""
    weight_decay: NotNegative = 0.0
    """AdamW's, apart from the gradient."""
    max_grad_norm: Positive | None = 1.0
    """The gradient of a step is scaled down to this norm; null: never."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """The same seed gives the same bytes on the same machine."""
    deterministic: bool = True
    """Have a GPU add up in one order, so that a run, broken off or not, gives the same bits; a CPU does anyway."""
    save_every: Count = 100
    """Steps from one checkpoint to the next."""
    eval_every: Count = 100
    """Steps from one evaluation of held-out rows to the next."""
    keep_checkpoints: Annotated[int, Field(ge=2, le=MOST)] = 2
    """At least two, so that there is a way back where the newest is damaged."""
    time_limit: Annotated[str, Field(pattern=rf"^\d+(\.\d+)? ?({'|'.join(_TIME_UNITS)})$")] | None = None
    """Save and stop (exit 75) before so much time is over, for example 11.5h."""
    early_stopping: Count | None = None
    """Stop after so many evaluations in a row without a better one overall; null: never."""
    keep_best: Literal["none", "overall", "tasks"] = "overall"
    """Which best adapters `best/` keeps a copy of: of the whole, or of every task too."""
    final: Literal["last", "best"] = "last"
    """What `adapter/` holds at the end: the adapter of the last step, or the best overall."""
    log_every: Count = 1
    """Steps from one line of `metrics.jsonl` to the next."""
    trackers: list[Literal["tensorboard", "wandb", "mlflow", "comet_ml", "aim"]] = Field(default=[])
    """Where numbers go besides; each must be installed."""

    @model_validator(mode="after")
    def _one_length(self) -> "Train":
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give either steps or epochs")
        if isinstance(self.micro_batch, int) and self.global_batch % self.micro_batch:
            raise ValueError(f"global_batch {self.global_batch} is not a multiple of micro_batch {self.micro_batch}")
        if self.final == "best" and self.keep_best == "none":
            raise ValueError("final: best needs keep_best: overall or tasks")
        return self


class Finish(Section):
    """What happens after the last step."""

    export: bool = False
    """Merge into an fp16 folder `export/` in the run folder."""
    score: bool = False
    """Answer the held-out rows with the base, the adapter and the export, and print the accuracy per task."""


def seconds_of(limit: str | None) -> float:
    """Return the seconds of a time limit; infinite where there is none."""
    if limit is None:
        return float("inf")
    unit = limit.lstrip("0123456789. ")
    return float(limit.removesuffix(unit)) * _TIME_UNITS[unit]


__all__ = ["HARMLESS", "Finish", "Growth", "LearnedRouting", "Rates", "Stage", "Train", "seconds_of"]
