"""One tokenizer for the data tests."""

from pathlib import Path

import pytest
import tiny
from transformers import PreTrainedTokenizerBase

from qd2mora.base import load_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    tiny.save_tokenizer(folder)
    return load_tokenizer(str(folder))
