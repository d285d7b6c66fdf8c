"""Masks by counters: the published generator, and rows that depend on nothing beside them."""

import pytest
import torch
from torch import Tensor

from qd2mora.mixture import masks
from qd2mora.mixture.draws import Rows
from qd2mora.mixture.masks import philox

# Random123's known answers for philox4x32 in ten rounds: counter (four words), key (two words), what comes of it.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "wanted"), KNOWN)
def test_philox_gives_the_known_answers(
    counter: tuple[int, ...], key: tuple[int, int], wanted: tuple[int, ...]
) -> None:
    number = counter[1] << 32 | counter[0]
    signed = torch.tensor([number - (1 << 64) * (number >> 63)])
    found = philox(signed, key[1] << 32 | key[0], counter[2], counter[3])
    assert tuple(int(word) for word in found) == wanted


def mask(rows: Rows, lines: int, tokens: int, width: int = 5, layer: int = 3, purpose: int = 1) -> Tensor:
    return masks.keep(torch.ones(lines, tokens, width), rows.spans(tokens), layer, purpose, masks.LEVELS // 2)


def test_a_rows_mask_is_the_same_alone_beside_others_padded_packed_and_in_small_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alone = mask(Rows((22,), (6,)), 1, 6)[0]
    beside = mask(Rows((11, 22), (9, 6)), 2, 9)
    assert torch.equal(beside[1, :6], alone)
    assert (beside[1, 6:] == 1).all()
    packed = mask(Rows((11, 22), (4, 6), ((0, 0), (0, 4))), 1, 12)
    assert torch.equal(packed[0, 4:10], alone)
    monkeypatch.setattr(masks, "_AT_ONCE", 1)
    assert torch.equal(mask(Rows((22,), (6,)), 1, 6)[0], alone)


def test_layers_masks_and_rows_have_numbers_of_their_own() -> None:
    rows = Rows((22,), (400,))
    plain = mask(rows, 1, 400)
    for other in (mask(rows, 1, 400, layer=4), mask(rows, 1, 400, purpose=2), mask(Rows((23,), (400,)), 1, 400)):
        assert abs((plain == other).float().mean() - 0.5) < 0.05


@pytest.mark.parametrize("dropped", [0, 1, 6554, 65_535])
def test_the_share_asked_for_is_dropped_and_the_mean_is_kept(dropped: int) -> None:
    kept = masks.keep(torch.ones(1, 2000, 300), [(7, 0, 0, 2000)], 1, 0, dropped)
    odds = dropped / masks.LEVELS
    assert abs((kept == 0).double().mean() - odds) <= 5 * (odds * (1 - odds) / kept.numel()) ** 0.5
    assert set(kept.unique().tolist()) <= {0.0, torch.tensor(1 / (1 - odds)).item()}
