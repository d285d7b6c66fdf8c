"""DeepSpeed's settings, generated from the recipe: ZeRO-2 and ZeRO-3, with what may move to host memory.

What DeepSpeed would decide by default and must not: it clips at 1.0 (the loop clips), it averages over processes and
accumulation (the loop has summed already), it casts every floating tensor of the model in its 16-bit modes, packed
4-bit weights stored as float16 included, which corrupts them without a word (so neither mode is used: adapters stay
float32), and it compiles its own Adam (torch's is used).
"""

import importlib.util
import os
import socket

import torch
from torch import nn

from qd2mora.errors import InputRefused
from qd2mora.mixture import MixtureConfig
from qd2mora.recipe import Recipe
from qd2mora.recipe.optimizers import may_be_blockwise

BUCKET = 1 << 23
"""Entries sent at once; the default, 500 million, is a buffer of 2 GB."""


def check_engine(recipe: Recipe, config: MixtureConfig) -> None:
    """Refuse what the engine cannot do. Raises InputRefused."""
    if recipe.memory.engine == "none":
        # `accelerate launch` sets this, and an Accelerator then wraps the model in an engine that no recipe asked for.
        if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
            raise InputRefused("memory.engine: none, but the launcher asks for DeepSpeed; set memory.engine=deepspeed")
        return
    if recipe.adapter.grow is not None:
        raise InputRefused("memory.engine: deepspeed shares experts out whole, and adapter.grow freezes some; none")
    if recipe.train.stages is not None:
        raise InputRefused(
            "memory.engine: deepspeed updates all that it shares out, and train.stages freezes some; none"
        )
    if importlib.util.find_spec("deepspeed") is None:
        raise InputRefused("memory.engine: deepspeed is not installed; pip install 'qd2mora[deepspeed]'")
    if may_be_blockwise(recipe.train.optimizer):
        raise InputRefused(
            f"train.optimizer: {recipe.train.optimizer} keeps moments in blocks that cross DeepSpeed's shards; adamw"
        )
    # A held-out loss takes as many passes on every process; answers do not, and one process would wait for ever.
    judged = [task.name for task in recipe.data.tasks if task.metric not in (None, "loss")]
    if recipe.memory.zero_stage == 3 and judged:
        raise InputRefused(
            f"memory.zero_stage: 3 cannot score '{judged[0]}' while training: its processes write answers of their own "
            "lengths, and gather weights together; metric: loss, or zero_stage: 2"
        )
    if config.row.stages or recipe.train.growth is not None:
        raise InputRefused(f"memory.engine: deepspeed flattens the moments that {config.method} resets; none")


def engine_settings(recipe: Recipe) -> dict[str, object]:
    """Return DeepSpeed's configuration."""
    memory = recipe.memory
    # No overlap: the engine's backward pass is one sum over gradients that are there already (`training.zero`), so
    # there is nothing to hide its messages behind.
    zero: dict[str, object] = {"stage": memory.zero_stage, "overlap_comm": False, "reduce_bucket_size": BUCKET}
    if memory.offload.optimizer == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if memory.offload.weights == "stream":
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        # One of each: DeepSpeed would divide by more, and the loop's gradients are normalised already.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        # With moments on the host DeepSpeed would else refuse every Adam but its own, which it compiles.
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }


def unshared(recipe: Recipe) -> str:
    """Say what the engine leaves whole on every process; nothing where there is no engine."""
    if recipe.memory.engine == "none":
        return ""
    place = ""
    if recipe.memory.offload.optimizer == "cpu":
        place = "in host memory, "
    if recipe.memory.zero_stage == 3:
        return (
            f"DeepSpeed ZeRO-3 shares out the moments ({place}1/P on each of P processes) and all frozen weights that "
            "are larger than an adapter's largest tensor, once every process has loaded them whole; there stay whole "
            "the quantisation state, small weights, adapters and a step's gradients. It is not in the plan's numbers"
        )
    return (
        f"DeepSpeed ZeRO-2 shares out the moments ({place}1/P on each of P processes); whole on every process stay the "
        "4-bit weights and their quantisation state, embeddings, head, norms, adapters and a step's gradients"
    )


def refuse_storage(model: nn.Module) -> None:
    """Refuse packed weights whose bytes an engine could take for numbers. Raises InputRefused."""
    for name, tensor in model.named_parameters():
        is_packed = hasattr(tensor, "quant_state")
        if is_packed and tensor.dtype != torch.uint8:
            raise InputRefused(
                f"base.model: {name} keeps its 4-bit weights as {str(tensor.dtype).removeprefix('torch.')}, which "
                "DeepSpeed would take for numbers; quantise with bnb_4bit_quant_storage=uint8, or memory.engine=none"
            )


def prepare_host() -> None:
    """Keep DeepSpeed from compiling its transport for processes of one CPU, and from asking for MPI where there is one.

    The first takes minutes and gloo is there; the second is what it does without the variables that a launcher sets.
    """
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False
    if "RANK" in os.environ:
        return
    # One that the system finds free: a fixed port would be taken where a second run starts beside this one.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ.update({**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})


__all__ = ["check_engine", "engine_settings", "prepare_host", "refuse_storage", "unshared"]
