"""What is refused of a recipe and its rows before the run folder is touched: what a method cannot do, or lacks.

Every function raises InputRefused, naming the key, the value and what would do.
"""

import logging

from transformers import LlamaConfig, PreTrainedTokenizerBase

from qd2mora.data import TaskRows
from qd2mora.data.limits import beyond
from qd2mora.errors import InputRefused
from qd2mora.evaluation import AskedTask, ask_held_out
from qd2mora.evaluation.rouge import rouge_l
from qd2mora.mixture import MixtureConfig
from qd2mora.recipe import Recipe, Train
from qd2mora.recipe.optimizers import may_be_blockwise
from qd2mora.recipe.train import LearnedRouting
from qd2mora.training.growth import Parts

_log = logging.getLogger(__name__)


def check_stages(config: MixtureConfig, recipe: Recipe) -> None:
    """Refuse growth that an adapter cannot have, and what would move experts that are closed."""
    train = recipe.train
    if Parts.of_run(config, train.growth).number == 1:
        return
    if not config.row.stages and (recipe.adapter.start is not None or recipe.adapter.adapters):
        raise InputRefused(
            "train.growth: experts that are given are no zeros, as those that are to open must be; leave it out"
        )
    if train.stages is not None:
        raise InputRefused(f"train.stages: {config.method} opens its experts in stages of its own; leave it out")
    # AdamW's decay moves a tensor whose gradient and moments are zero.
    if train.weight_decay:
        raise InputRefused(
            f"train.weight_decay: {train.weight_decay:g} would move closed experts of {config.method}; 0"
        )
    if may_be_blockwise(train.optimizer):
        raise InputRefused(
            f"train.optimizer: {train.optimizer} keeps moments in blocks that cross experts; adamw for {config.method}"
        )


def check_tasks(config: MixtureConfig, recipe: Recipe) -> None:
    """Refuse fewer tasks than the start tells apart: which ones they are nobody knows, unless a head asks them all."""
    num_tasks = len(recipe.data.tasks)
    if config.num_tasks not in (None, num_tasks) and recipe.tasks_over_experts is None:
        raise InputRefused(
            f"data.tasks: {num_tasks}, but '{recipe.adapter.start}' tells {config.num_tasks} tasks apart"
        )


def check_routing(config: MixtureConfig, train: Train) -> None:
    """Refuse a change of routing while it is learned that the method cannot make, or no routers for; and labels."""
    is_labelled = any(penalty.kind == "base_or_expert" for penalty in config.routing_penalties)
    if is_labelled and any(gate.weight != "sigmoid" for gate in config.routers.values()):
        raise InputRefused(f"adapter.penalties.base_or_expert: labels sigmoid gates; base_gate, not {config.method}")
    told = train.routing
    if told is None:
        return
    if not config.routers:
        raise InputRefused(f"train.routing: {config.method} has no routers; leave it out")
    if told.penalty_steps and not config.routing_penalties:
        raise InputRefused(
            f"train.routing.penalty_steps: {config.method} has no penalty on routing; name one in adapter.penalties"
        )
    if told.top_k is not None:
        own = [gate.top_k for gate in config.routers.values() if gate.select == "top_k" and gate.top_k is not None]
        if not own or told.top_k <= max(own):
            ways = "falls to the gates' own number" if own else "is for a method that chooses one, such as mixlora"
            uses = f"uses {max(own)} already" if own else "chooses no top k"
            raise InputRefused(f"train.routing.top_k: {told.top_k}, but {config.method} {uses}; it {ways}")
    draws = any(gate.select == "sample" for gate in config.routers.values())
    for key in ("draws", "estimator"):
        if getattr(told, key) != getattr(LearnedRouting(), key) and not draws:
            raise InputRefused(
                f"train.routing.{key}: {getattr(told, key)}, but {config.method} draws no experts; leave it out, or "
                "have a gate of adapter.gates draw them (select: sample)"
            )
    if told.uniform_steps and (draws or config.row.stages or config.row.placement == "mlp"):
        raise InputRefused(
            f"train.routing.uniform_steps: {config.method} cannot weigh all its experts alike: it draws few of them, "
            "adds them one by one, or runs whole MLPs of those chosen; 0"
        )


def check_packing(config: MixtureConfig) -> None:
    """Refuse to pack rows for a method that reads or judges each row as a whole."""
    for role, gate in config.routers.items():
        reads = {"task": "the task", "task+x": "the task", "external": "a vector"}.get(gate.input)
        reason = ""
        if gate.select == "sample":
            reason = "counts by whole rows"
        elif gate.is_averaged:
            reason = "averages over each row"
        elif reads:
            reason = f"reads {reads} of each row"
        if reason:
            raise InputRefused(f"data.packing: gate_{role} of {config.method} {reason}, which shared lines hide; false")
    for penalty in config.routing_penalties:
        if penalty.over == "row" or penalty.kind in ("localized_balance", "router_ce", "base_or_expert"):
            raise InputRefused(
                f"data.packing: the penalty {penalty.kind} of {config.method} is taken row by row, which shared lines "
                "hide; false"
            )


def check_rows(config: MixtureConfig, tasks: list[TaskRows]) -> None:
    """Refuse rows that lack what the method reads of them."""
    balances = any(penalty.kind == "localized_balance" for penalty in config.routing_penalties)
    for task in tasks:
        name = f"data.tasks.{task.task.name}"
        if balances and task.task.group is None:
            raise InputRefused(
                f"{name}.group: the localised balance of {config.method} steers rows to halves of the experts: give 0 "
                "or 1, or set adapter.penalty=0"
            )
        if config.row.gates.reads_vector:
            _check_vectors(name, config, task)


def check_spans(config: MixtureConfig, recipe: Recipe, tasks: list[TaskRows]) -> None:
    """Refuse marks without adapters and adapters without marks; say where marks change nothing."""
    names, method = recipe.data.spans, config.method
    if not config.routers.reads_spans:
        if names is not None:
            _log.warning("data.spans: %s reads no marks; spans change nothing", method)
        return
    if names is None:
        raise InputRefused(
            f"data.spans: {method} acts in marked spans alone; name their adapters: data.spans=[code,quote]"
        )
    counts = config.row.experts_of(config.num_down, config.num_up, config.rank or 1, config.num_cores)
    number = min(counts[role] for role, gate in config.routers.items() if gate.input == "span")
    if len(names) > number:
        raise InputRefused(f"data.spans: {len(names)} names, and {method} has {number} experts: one for each name")
    if len(names) < number:
        _log.warning(
            "data.spans: %d of the %d experts of %s have no name and learn nothing", number - len(names), number, method
        )
    if recipe.objective.kind == "grpo":
        raise InputRefused("objective.kind: grpo writes answers of its own, in which nothing marks a span; sft")
    if not any(row.marks for task in tasks for row in task.train):
        raise InputRefused(f"data.spans: no row marks a span, and {method} acts in no other place (docs/data.md)")


def check_limits(tasks: list[TaskRows], tokenizer: PreTrainedTokenizerBase, base: LlamaConfig) -> None:
    """Refuse rows that are longer than the base was made for, or hold tokens that it does not know."""
    for problem in beyond(tasks, tokenizer, base):
        raise InputRefused(problem)


def _check_vectors(name: str, config: MixtureConfig, task: TaskRows) -> None:
    if task.task.vector is None:
        raise InputRefused(f"{name}.vector: {config.method} reads a vector of each row; name the field that holds it")
    for row in (*task.train, *task.validation):
        width = len(row.pair.vector or ())
        if width != config.external_width:
            raise InputRefused(
                f"{name}.vector: {width} numbers in a row, adapter.external_width {config.external_width}"
            )


def check_prompts(recipe: Recipe, tasks: list[TaskRows]) -> None:
    """Refuse rows that leave nothing to write after where the run writes its answers itself."""
    if recipe.objective.kind != "grpo":
        return
    for task in tasks:
        if task.task.format == "text":
            raise InputRefused(f"data.tasks.{task.task.name}.format: text has no prompts that grpo could answer")


def check_judging(recipe: Recipe, tasks: list[TaskRows]) -> None:
    """Refuse to judge without held-out rows."""
    keys = []
    if recipe.train.final == "best":
        keys.append("final")
    if recipe.train.early_stopping:
        keys.append("early_stopping")
    if recipe.train.growth:
        keys.append("growth")
    if keys and not any(task.validation for task in tasks):
        raise InputRefused(f"train.{keys[0]}: no task holds out rows to judge by; set data.tasks.0.validation=200")


def tasks_to_score(tasks: list[TaskRows]) -> list[AskedTask]:
    """Return the tasks that name a metric other than the loss, to be scored beside it while a run goes on."""
    asked = ask_held_out([task for task in tasks if task.task.metric not in (None, "loss")])
    if any(task.metric == "rouge" for task in asked):
        rouge_l()  # refused here, where it is not installed
    return asked


__all__ = [
    "check_judging",
    "check_limits",
    "check_packing",
    "check_prompts",
    "check_rows",
    "check_spans",
    "check_stages",
    "check_tasks",
    "tasks_to_score",
]
