"""What of rows a base cannot take: more tokens than it was made for, tokens that its embedding does not have."""

from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from qd2mora.data.prepare import TaskRows
from qd2mora.data.token_rows import Row, TokenRows, lengths_of


def beyond(tasks: Sequence[TaskRows], tokenizer: PreTrainedTokenizerBase, config: Any) -> Iterator[str]:
    """Yield a line for each thing of the rows that a base of this configuration was not made for."""
    positions, num_tokens = positions_of(config), int(config.vocab_size)
    for task in tasks:
        where = f"data.tasks.{task.task.name}"
        for rows in (task.train, task.validation):
            lengths = lengths_of(rows)
            if len(rows) and lengths.max() > positions:
                yield (
                    f"{where}: {(lengths > positions).sum()} rows of up to {lengths.max()} tokens, the model is made "
                    f"for {positions} (max_position_embeddings); data.max_length={positions} cuts them"
                )
            largest = max(_largest_id(rows), int(tokenizer.pad_token_id))
            if len(rows) and largest >= num_tokens:
                yield (
                    f"{where}: its rows hold token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}), the "
                    f"embedding of base.model has {num_tokens} rows; the tokenizer is that of another model"
                )


def positions_of(config: Any) -> int:
    """Return how many tokens of a row a model was made for, its scaling of positions counted."""
    positions, rope = int(config.max_position_embeddings), config.rope_parameters
    kind = rope.get("rope_type")
    if kind == "dynamic":
        return int(positions * rope.get("factor", 1))
    if kind == "yarn":
        return max(positions, int(rope.get("original_max_position_embeddings", positions) * rope.get("factor", 1)))
    return positions


def _largest_id(rows: Sequence[Row]) -> int:
    if isinstance(rows, TokenRows):
        return rows.store.largest_id
    return max((int(row.ids.max()) for row in rows), default=0)


__all__ = ["beyond", "positions_of"]
