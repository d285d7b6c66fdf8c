"""Random numbers as pure functions of where they are used: nothing to save, nothing to restore.

A key is a hash of the recipe's seed, a purpose, and a place in the run (an update, a process, a row's number in the
endless sequence of rows). A step that is done again, on another split into micro batches or after a resume, draws
the same numbers.
"""

import hashlib
from typing import Literal

Purpose = Literal["step", "row"]


def key_of(seed: int, purpose: Purpose, *place: int) -> int:
    """Return a non-negative key below 2**63."""
    text = f"{seed} {purpose} {' '.join(map(str, place))}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


__all__ = ["Purpose", "key_of"]
