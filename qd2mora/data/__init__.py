"""Data: files to rows, rows to tokens, tokens to batches, in an order that is a pure function of the seed."""

from qd2mora.data.collate import collate
from qd2mora.data.first_rows import FirstRows, first_rows, row_count
from qd2mora.data.formats import FORMATS
from qd2mora.data.pack import MULTIPLE, MicroBatch, dealt, lines_together, packed
from qd2mora.data.pair import Pair
from qd2mora.data.prepare import TaskRows, encode, prepare
from qd2mora.data.read import Skipped, content_hash, read_pairs
from qd2mora.data.task_mix import Share, TaskMix, share_lines
from qd2mora.data.token_rows import Row, TokenRows, lengths_of
from qd2mora.data.tokenise import tokenizer_text

__all__ = [
    "FORMATS",
    "MULTIPLE",
    "FirstRows",
    "MicroBatch",
    "Pair",
    "Row",
    "Share",
    "Skipped",
    "TaskMix",
    "TaskRows",
    "TokenRows",
    "collate",
    "content_hash",
    "dealt",
    "encode",
    "first_rows",
    "lengths_of",
    "lines_together",
    "packed",
    "prepare",
    "read_pairs",
    "row_count",
    "share_lines",
    "tokenizer_text",
]
