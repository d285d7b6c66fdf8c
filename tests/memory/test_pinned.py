"""Host memory that cannot be pinned is used as it is, and that is said once."""

import logging
from dataclasses import replace

import pytest
import torch
from test_techniques import PLAIN, losses_and_gradients, plain_result, prepared

from qd2mora.memory import checkpointing, pinned, streaming
from qd2mora.memory.pinned import host_buffer


@pytest.mark.skipif(torch.cuda.is_available(), reason="here host memory can be pinned")
def test_where_nothing_can_be_pinned_plain_memory_is_given_and_it_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Without a device torch refuses to pin: a true failure."""
    pinned._told.clear()
    with caplog.at_level(logging.WARNING):
        buffers = [host_buffer(pinned, (3, 5), torch.bfloat16, is_pinned=True) for _ in range(3)]
        given = torch.arange(4.0)
        assert pinned.pinned(given) is given
    assert [(buffer.shape, buffer.dtype) for buffer in buffers] == [((3, 5), torch.bfloat16)] * 3
    assert sum("cannot be pinned" in record.message for record in caplog.records) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="here host memory can be pinned")
def test_a_run_whose_buffers_cannot_be_pinned_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streamed layers and layer inputs that leave, all asking for pinned memory."""
    asked = []

    def asking(owner: object, shape: torch.Size, dtype: torch.dtype, is_pinned: bool) -> torch.Tensor:
        asked.append(shape)
        return host_buffer(owner, shape, dtype, is_pinned=True)

    for module in (checkpointing, streaming):
        monkeypatch.setattr(module, "host_buffer", asking)
    setting = replace(PLAIN, recomputed=5, offload_activations=True, stream=True)
    results = losses_and_gradients(prepared(setting)[0])
    assert len(asked) >= 10  # five layers, five inputs
    assert all(map(torch.equal, results, plain_result()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_buffers_are_pinned() -> None:
    assert host_buffer(pinned, (7,), torch.uint8, is_pinned=True).is_pinned()
    assert not host_buffer(pinned, (7,), torch.uint8, is_pinned=False).is_pinned()
