"""Plain Hugging Face weights: a folder that transformers, vLLM and every converter load, written weight by weight."""

import json
from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qd2mora.base.device import FLOATS
from qd2mora.base.loading import write_generation
from qd2mora.base.tokenizer import save_tokenizer
from qd2mora.disk.shards import write_shards
from qd2mora.merging.base_weights import BaseWeights
from qd2mora.merging.rung import SHARD_BYTES, ExportForm, Rung, WriteFolder, Written
from qd2mora.merging.static_updates import Statics
from qd2mora.merging.updated_weights import (
    OUTPUT,
    WeightUpdate,
    updated_weights,
    weight_updates_of,
    weights_changed_by,
)
from qd2mora.run_folder import OpenRun


def write_model(
    weights: BaseWeights,
    tokenizer: PreTrainedTokenizerBase,
    updates: Mapping[str, WeightUpdate],
    folder: Path,
    *,
    dtype: str = "float16",
    limit: int = SHARD_BYTES,
) -> Written:
    """Write the base's weights into an existing folder, each linear of `updates` changed, in files of at most `limit`.

    Raises NotFinite where a weight does not fit the dtype, InputRefused where the base lacks what is to be changed.
    """
    written = Written()
    tensors = updated_weights(weights, updates, FLOATS[dtype], written.rounding)
    written.files = write_shards(folder, tensors, limit)
    config = config_of(weights, dtype)
    if OUTPUT in weights_changed_by(updates):
        # An output matrix that took an update is no longer the embedding, which took none.
        config["tie_word_embeddings"] = False
    write_config(config, folder)
    # End tokens and the like stand there alone in newer models; without it text would not end.
    write_generation(weights.base.model, folder)
    save_tokenizer(tokenizer, folder)
    return written


def config_of(weights: BaseWeights, dtype: str) -> dict[str, object]:
    """Return the base's configuration for plain weights of the dtype."""
    content: dict[str, object] = weights.config.to_dict()
    # What tells of the weights as they were: in 4 bits, in another dtype, in another folder.
    for key in ("quantization_config", "_pre_quantization_dtype", "_name_or_path", "torch_dtype"):
        content.pop(key, None)
    return content | _older_rope(content) | {"dtype": dtype, "architectures": [weights.architecture]}


def _older_rope(content: Mapping[str, object]) -> dict[str, object]:
    """Return positions as transformers 4 and converters spell them; without, they would take 10000 and no scaling."""
    rope = content.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" not in rope:  # one for each kind of layer has no older spelling
        return {}
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    is_scaled = scaling.get("rope_type", "default") != "default"
    older = {"rope_theta": rope["rope_theta"]}
    if is_scaled:  # where there is none, transformers 5 warns of the old name, and 4 needs none
        older["rope_scaling"] = scaling
    return older


def write_config(content: Mapping[str, object], folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _prepare(opened: OpenRun, weights: BaseWeights, statics: Statics, form: ExportForm) -> WriteFolder:
    updates, tokenizer = weight_updates_of(opened.model, statics), opened.tokenizer
    return lambda folder: write_model(weights, tokenizer, updates, folder, dtype=form.dtype, limit=form.limit)


RUNG = Rung(_prepare, ("float16", "bfloat16", "float32"), has_shards=True)

__all__ = ["RUNG", "config_of", "write_config", "write_model"]
