"""How a run meets its launcher: one process, or several that torchrun, accelerate or deepspeed have started."""

import importlib.util
import os
import sys

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DistributedType, InitProcessGroupKwargs, set_seed
from transformers.integrations import unset_hf_deepspeed_config

from qd2mora.base import default_device
from qd2mora.errors import InputRefused
from qd2mora.memory.engine import engine_settings, prepare_host
from qd2mora.recipe import Recipe
from qd2mora.run_folder import RunFolder
from qd2mora.training.processes import PATIENCE


def launched(recipe: Recipe, folder: RunFolder) -> Accelerator:
    """Return the accelerator of this process. Raises InputRefused."""
    for tracker in recipe.train.trackers:
        if importlib.util.find_spec(tracker) is None:
            raise InputRefused(f"train.trackers: {tracker} is not installed; pip install {tracker}")
    prepare_allocator()
    is_sharded, on_cpu = recipe.memory.engine == "deepspeed", default_device().type == "cpu"
    backend, engine = None, None
    if is_sharded:
        prepare_host()
        engine = DeepSpeedPlugin(hf_ds_config=engine_settings(recipe), zero3_init_flag=False)
    # With cpu=True accelerate 1.15 passes over the engine; without, it needs to be told of gloo.
    if is_sharded and on_cpu:
        backend = "gloo"
    accelerator = Accelerator(
        cpu=on_cpu and not is_sharded,
        # Autocast is the loop's own (`row_losses`), and only where a run is float16.
        mixed_precision="no",
        deepspeed_plugin=engine,
        kwargs_handlers=[InitProcessGroupKwargs(backend=backend, timeout=PATIENCE)],
        log_with=list(recipe.train.trackers) or None,
        project_dir=str(folder.path),
    )
    if is_sharded:
        # Weights are loaded whole and shared out afterwards: transformers, which would go by the settings that
        # accelerate shows it, cannot load 4-bit ones in shards.
        unset_hf_deepspeed_config()
    if is_sharded != (accelerator.distributed_type == DistributedType.DEEPSPEED):
        raise InputRefused(
            f"memory.engine: {recipe.memory.engine}, but accelerate was set up otherwise in this process before; start "
            "the run in a process of its own"
        )
    rows, processes = recipe.train.global_batch, accelerator.num_processes
    if rows % processes:
        raise InputRefused(f"train.global_batch: {rows} rows do not divide over {processes} processes")
    set_seed(recipe.train.seed)
    return accelerator


def prepare_allocator() -> None:
    """Let the card's allocator grow its blocks, so that rows of changing length leave no holes; before its first use.

    Settings of the user's own stay. Windows has no such blocks.
    """
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # since torch 2.9, before
    if sys.platform == "linux" and not any(name in os.environ for name in names):
        version = tuple(int(part) for part in torch.__version__.split(".")[:2])
        os.environ[names[0] if version >= (2, 9) else names[1]] = "expandable_segments:True"


__all__ = ["launched", "prepare_allocator"]
