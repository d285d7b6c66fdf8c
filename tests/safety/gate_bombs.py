"""BM1: safetensors files whose headers lie, are huge, or are deep."""

import json
import random
import struct
import zlib
from pathlib import Path
from typing import Any

from forked import Result
from gate_files import copied, opening

LIMIT_S = 10.0


def _bomb(chance: random.Random) -> bytes:  # noqa: C901 - one branch a kind
    """Return a safetensors file whose header lies, is huge, or is deep."""
    big = chance.choice(
        [1 << 31, 1 << 40, 1 << 62, 1 << 63, (1 << 64) - 1, 10**30, -1, -(1 << 63), 1.5, True, None, "9"]
    )
    entry: dict[str, Any] = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    header: Any = {"x": entry}
    data = bytes(16)
    kind = chance.randrange(14)
    if kind == 0:
        entry["shape"] = [big]
    elif kind == 1:
        entry["data_offsets"] = [0, big]
    elif kind == 2:
        header["y"] = {"dtype": "F32", "shape": [2], "data_offsets": [chance.randrange(1, 9), 16]}
    elif kind == 3:
        data += bytes(chance.randrange(1, 99))
    elif kind == 4:
        return struct.pack("<Q", chance.choice([1 << 62, (1 << 64) - 1, 1 << 40, 99, 3 << 20])) + b"{" + data
    elif kind == 5:
        return _framed(b'{"x":' * chance.randrange(2000, 200_000), data)
    elif kind == 6:
        return _framed(b"[" * chance.randrange(2000, 200_000), data)
    elif kind == 7:
        one = b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[16,16]},'
        return _framed(b"{" + b"".join(one % number for number in range(chance.choice([20_000, 60_000]))) + b"}", data)
    elif kind == 8:
        entry["dtype"] = chance.choice(["F31", "", None, 5, ["F32"], {}, "f32", "F32\0"])
    elif kind == 9:
        header = chance.choice(
            [{"x": None}, {"x": []}, {"x": {}}, {"x": 5}, {"__metadata__": {}}, {"x": {"dtype": "F32"}}]
        )
    elif kind == 10:
        return _framed(b'{"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, "x": {}}', data)
    elif kind == 11:
        return _framed(b'{"x": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 16]}}', data)
    elif kind == 12:
        entry["shape"] = [1 << 20] * chance.randrange(2, 4000)
    else:
        whole = bytearray(_framed(json.dumps(header).encode(), data))
        return bytes(whole[: chance.randrange(len(whole))]) if chance.random() < 0.7 else zlib.compress(bytes(whole))
    return _framed(json.dumps(header).encode(), data)


def _framed(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def _check_headers(result: Result, folder: Path) -> None:
    """Check each guard on its own, before a library reads the file; the entries of a whole header are 16 bytes each."""
    from qd2mora.disk.tensor_file import MAX_HEADER, check_safetensors
    from qd2mora.errors import DamagedFile

    def entry(begin: int, end: int) -> dict[str, Any]:
        return {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}

    whole = json.dumps({"x": entry(0, 16), "y": entry(16, 32)}).encode()
    long = json.dumps({"x": entry(0, 16), "__metadata__": {"note": " " * MAX_HEADER}}).encode()
    twins = whole[:-1] + b"," + whole[1:]
    cases = [
        ("whole", whole, 32, ""),
        ("overlap", json.dumps({"x": entry(0, 16), "y": entry(8, 24)}).encode(), 24, "tensors overlap or leave a gap"),
        ("gap", json.dumps({"x": entry(0, 16), "y": entry(24, 40)}).encode(), 40, "tensors overlap or leave a gap"),
        ("tail", whole, 33, "32 bytes of tensors in 33 bytes of data"),
        ("long", long, 16, f"(limit {MAX_HEADER})"),
        ("twins", twins, 32, "a key is given twice"),
    ]
    for name, header, size, wanted in cases:
        path = folder / f"{name}.safetensors"
        path.write_bytes(_framed(header, bytes(size)))
        try:
            check_safetensors(path)
            said = ""
        except DamagedFile as error:
            said = str(error)
        result.check(wanted in said and bool(wanted) == bool(said), f"{name}: {said!r}, not {wanted!r}")


def gate_bombs(made: Path, folder: Path, count: int, seed: int = 0) -> Result:
    """BM1: crafted headers in the base or the adapter are refused at once and under 50 MiB.

    Refusing takes under a second of a quiet core; the limit is where a header that is believed would lie.
    """
    result, chance = Result("BM1"), random.Random(seed)
    case = copied(made, folder)
    slots = [case / "base" / "model.safetensors", case / "run" / "adapter" / "adapter_model.safetensors"]
    _check_headers(result, folder)
    slowest, largest = 0.0, 0.0
    for number in range(count):
        slot = slots[number % 2]
        whole = slot.read_bytes()
        slot.write_bytes(_bomb(chance))
        outcome = opening(case)
        slot.write_bytes(whole)
        slowest, largest = max(slowest, outcome.cpu_s), max(largest, outcome.grown_mib)
        held = outcome.code in (2, 6) and outcome.is_one_error_line
        result.check(
            held and outcome.cpu_s < LIMIT_S and outcome.grown_mib < 50, f"header {number}, seed {seed}: {outcome}"
        )
    result.numbers = {"slowest_cpu_s": slowest, "largest_grown_mib": largest}
    return result
