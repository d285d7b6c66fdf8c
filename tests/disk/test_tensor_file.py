"""safetensors files: what is written is read again, by rows and by the library, whatever the dtype."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qd2mora.disk.tensor_file import (
    DTYPES,
    check_safetensors,
    encoded,
    inventory_of,
    stored_tensors,
    tensor_at_hand,
    write_tensors,
)


def of_dtype(dtype: torch.dtype) -> Tensor:
    """Any bytes are numbers of most dtypes; of a bool they are 0 or 1."""
    numbers = torch.randint(0, 2, (5, 3, dtype.itemsize), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return numbers.view(dtype).view(5, 3)


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_is_written_and_read_as_the_library_does(name: str, tmp_path: Path) -> None:
    tensors = {"matrix": of_dtype(DTYPES[name]), "one": of_dtype(DTYPES[name])[0, 0], "none": torch.empty(0, 4)}
    write_tensors(tmp_path / "ours", [tensor_at_hand(*each) for each in tensors.items()])
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "theirs")
    for path in (tmp_path / "ours", tmp_path / "theirs"):
        stored, loaded = stored_tensors([path]), load_file(path)
        assert stored.keys() == loaded.keys() == tensors.keys()
        assert stored["matrix"].get_dtype() == name
        for key, tensor in tensors.items():
            bytes_of = [each.reshape(-1).view(torch.uint8) for each in (stored[key].read(), loaded[key], tensor)]
            assert stored[key].shape == loaded[key].shape == tensor.shape
            assert bytes_of[0].equal(bytes_of[1]) and bytes_of[0].equal(bytes_of[2])
        rows = stored["matrix"].read(1, 4)
        assert rows.view(torch.uint8).equal(tensors["matrix"][1:4].view(torch.uint8))


def test_the_order_of_tensors_changes_no_byte_of_an_encoded_file() -> None:
    tensors = {"b": torch.arange(3), "a": torch.ones(2, 2).half(), "c": torch.zeros(1)}
    backwards = dict(reversed(tensors.items()))
    assert b"".join(map(bytes, encoded(tensors))) == b"".join(map(bytes, encoded(backwards)))
    assert inventory_of(tensors) == {"b": ("I64", [3]), "a": ("F16", [2, 2]), "c": ("F32", [1])}


def test_wide_numbers_stand_before_narrow_ones_and_begin_where_their_size_divides(tmp_path: Path) -> None:
    tensors = {"byte": torch.ones(3, dtype=torch.uint8), "half": torch.ones(3).half(), "wide": torch.ones(1).double()}
    write_tensors(tmp_path / "x", [tensor_at_hand(*each) for each in tensors.items()])
    check_safetensors(tmp_path / "x")
    stored = stored_tensors([tmp_path / "x"])
    assert sorted(stored, key=lambda name: stored[name].start) == ["wide", "half", "byte"]
    assert all(each.start % each.dtype.itemsize == 0 for each in stored.values())
