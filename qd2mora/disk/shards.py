"""Weights in several files, as transformers reads them: each of a limited size, and an index of what is where."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from qd2mora.disk.durable import write_file
from qd2mora.disk.file_hash import SizeAndHash
from qd2mora.disk.tensor_file import TensorToWrite, write_tensors

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def write_shards(folder: Path, tensors: Sequence[TensorToWrite], limit: int) -> dict[str, SizeAndHash]:
    """Write `model.safetensors`, or several files of at most `limit` bytes (or one tensor) with their index."""
    shards = list(_shards(tensors, limit))
    if len(shards) == 1:
        return {WHOLE: write_tensors(folder / WHOLE, shards[0])}
    files, places = {}, {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        files[name] = write_tensors(folder / name, shard)
        places.update({each.name: name for each in shard})
    total = sum(each.num_bytes for each in tensors)
    content = json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=1) + "\n"
    files[INDEX] = write_file(folder / INDEX, [content.encode()])
    return files


def _shards(tensors: Sequence[TensorToWrite], limit: int) -> Iterator[list[TensorToWrite]]:
    shard: list[TensorToWrite] = []
    size = 0
    for each in tensors:
        # Tensors are never cut: one that is larger than the limit has a file of its own.
        if shard and size + each.num_bytes > limit:
            yield shard
            shard, size = [], 0
        shard.append(each)
        size += each.num_bytes
    yield shard


__all__ = ["INDEX", "WHOLE", "write_shards"]
