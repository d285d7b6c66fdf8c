"""The frozen model: its files, its weights in NF4, its tokenizer, and the shapes that are known by name."""

import logging
import warnings

from transformers import logging as transformers_logging

from qd2mora.base.device import compute_dtype, default_device
from qd2mora.base.files import RANDOM, fingerprint, local_folder
from qd2mora.base.loading import base_config, ends_alone, load_base
from qd2mora.base.nf4 import dense_weight, is_nf4, nf4_linear
from qd2mora.base.random_weights import random_base
from qd2mora.base.shapes import SHAPES, Shape
from qd2mora.base.tokenizer import load_tokenizer

# It reports, at import, that an optional CPU kernel is not installed.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()
# transformers 5.23 renames gradient checkpointing; 5.17 knows only the old names, which PEFT calls too.
warnings.filterwarnings("ignore", r".*gradient_checkpointing", FutureWarning)

__all__ = [
    "RANDOM",
    "SHAPES",
    "Shape",
    "base_config",
    "compute_dtype",
    "default_device",
    "dense_weight",
    "ends_alone",
    "fingerprint",
    "is_nf4",
    "load_base",
    "load_tokenizer",
    "local_folder",
    "nf4_linear",
    "random_base",
]
