"""A paged optimiser's moments after a resume."""

import bitsandbytes
import pytest
import torch
from torch import Tensor

from qd2mora.training.updates import page_again


class Noting(bitsandbytes.optim.PagedAdamW8bit):  # type: ignore[misc]
    """Notes the buffers that it hands out for moments: on a GPU those are managed memory."""

    given: list[Tensor]

    def get_state_buffer(self, p: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        buffer: Tensor = super().get_state_buffer(p, dtype)
        self.given.append(buffer)
        return buffer


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_loaded_moments_lie_where_a_paged_optimiser_keeps_its_own() -> None:
    trained = [torch.nn.Parameter(torch.randn(500, 300))]
    first, second = (Noting(trained, lr=0.01) for _ in range(2))
    first.given, second.given = [], []
    trained[0].grad = torch.randn(500, 300)
    first.step()
    second.load_state_dict(first.state_dict())
    page_again(second)
    (state,), (wanted,) = second.state.values(), first.state.values()
    assert len(second.given) == 2
    for key, buffer in zip(("state1", "state2"), second.given, strict=True):
        assert state[key] is buffer
        assert torch.equal(buffer, wanted[key])
