"""What is asked: a run with its routed adapter, or any model folder."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from qd2mora.base import load_base, load_tokenizer
from qd2mora.errors import InputRefused
from qd2mora.mixture import read_rows, reads_first_pass
from qd2mora.recipe import Base
from qd2mora.run_folder import OpenRun, is_run, open_run


@dataclass(frozen=True)
class Subject:
    """A model that answers; `model` is a PeftModel for a run and a plain transformers model otherwise."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    run: OpenRun | None = None

    @property
    def plain(self) -> Any:
        """The transformers model, adapters inside."""
        return self.model.base_model.model if self.run else self.model

    def route(self, batch: Mapping[str, Tensor]) -> None:
        """Tell the routers what a batch says of its rows; a plain model needs no telling."""
        if self.run:
            read_rows(self.model, batch)

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Be the base while the block runs."""
        assert self.run is not None
        with self.model.disable_adapter():
            yield

    def continue_texts(self, ids: Tensor, mask: Tensor, max_new_tokens: int) -> list[list[int]]:
        """Continue left-padded prompts (rows, length) greedily; return the new tokens of each row, without the end."""
        eos = self.tokenizer.eos_token_id
        settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=eos,
            use_cache=not (self.run and reads_first_pass(self.model)),
        )
        with torch.no_grad():
            out = self.plain.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
        return [_until(row, eos) for row in out[:, ids.shape[1] :].tolist()]


def open_subject(path: str | Path, allow_changed: Collection[str] = ()) -> Subject:
    """Open a run or a model folder for asking. Raises InputRefused, DamagedFile."""
    if is_run(path):
        opened = open_run(path, allow_changed=allow_changed)
        return Subject(opened.model, opened.tokenizer, opened)
    if not Path(path).is_dir():
        raise InputRefused(f"'{path}': no such folder; name a run or a model folder")
    base = Base(model=str(path), quantization="none")
    return Subject(load_base(base), load_tokenizer(base.model))


def _until(tokens: list[int], end: int) -> list[int]:
    return tokens[: tokens.index(end)] if end in tokens else tokens


__all__ = ["Subject", "open_subject"]
