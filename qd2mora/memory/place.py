"""Where a run is planned for, and the room that it has there: the device that is here, or a GPU that is asked for."""

from dataclasses import dataclass

import torch

from qd2mora.base import compute_dtype, default_device
from qd2mora.base.host_memory import available_bytes
from qd2mora.recipe import Recipe

GIB = 1 << 30
RESERVED_SHARE = 0.04
"""Of a budget or of what is free: what a plan leaves, as allocators keep holes and other programs grow."""
LEAST_RESERVE = 256 << 20
LEAST_CONTEXT = 256 << 20
"""A context before any kernel is loaded, on today's cards at least."""
MOST_OF_SMALL = 8
"""Of less than 2 GiB the least reserve would be too much: there it is an eighth."""


@dataclass(frozen=True)
class Place:
    """The device of a plan."""

    device: torch.device
    is_here: bool
    agreed: int | None = None
    """The least that any of several processes has free, where they have told each other."""

    @classmethod
    def of(cls, device: torch.device | None, has_budget: bool, agreed: int | None = None) -> "Place":
        """Return the place of a plan; where no device is named, the one that is here.

        A budget without a device is that of a GPU, as cards are planned for on machines that have none.
        """
        if device is None:
            device = default_device()
            if has_budget:
                device = torch.device("cuda", device.index)
        return cls(device, device.type != "cuda" or torch.cuda.is_available(), agreed)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def name(self) -> str:
        """Return what people call it."""
        if not self.on_gpu:
            return "cpu"
        if not self.is_here:
            return "a GPU that is not here"
        return torch.cuda.get_device_name(self.device)

    def dtype(self, recipe: Recipe) -> torch.dtype:
        """Return what products run in; a GPU that is not here is one of today, which computes in bfloat16."""
        if not self.is_here and recipe.base.compute_dtype == "auto":
            return torch.bfloat16
        return compute_dtype(recipe.base, self.device)


def room_on_card(device: torch.device) -> int:
    """Return the bytes that this process may have on its card: what is free, and what it has taken itself.

    What other processes hold is not free, whatever the card has. Asking opens a context, which a plan counts whole: the
    least that one takes is given back here, or it would be counted twice.
    """
    free: int = torch.cuda.mem_get_info(device)[0]
    return free + int(torch.cuda.memory_reserved(device)) + LEAST_CONTEXT


@dataclass(frozen=True)
class Limit:
    """The bytes that a plan has to fit, if any, and who says so."""

    size: int | None
    source: str
    is_found: bool = False
    """Whether it is what is free now, which may be another number at the next start."""

    @classmethod
    def of_free(cls, place: Place) -> "Limit":
        """Return what this process can have: on the GPU, or on the machine and within its container's limit."""
        if not place.is_here:
            return cls(None, "no budget named")
        if place.agreed is not None:
            return cls(place.agreed, "what is free on each device", True)
        if place.on_gpu:
            return cls(room_on_card(place.device), "what is free on the device", True)
        return cls(available_bytes(), "what is free on this machine", True)

    @classmethod
    def of_budget(cls, size: int, source: str, place: Place) -> "Limit":
        """Return a budget that is named, or what the card has, where that is less."""
        if place.on_gpu and place.is_here:
            free = cls.of_free(place)
            assert free.size is not None
            # A budget is often a card's whole memory, of which others have a part by now.
            if free.size < size:
                return free
        return cls(size, source)

    @property
    def reserve(self) -> int:
        """Return the bytes that a plan leaves."""
        size = self.size or 0
        return max(int(RESERVED_SHARE * size), min(LEAST_RESERVE, size // MOST_OF_SMALL))

    @property
    def usable(self) -> int | None:
        """Return the bytes that a plan may take."""
        if self.size is None:
            return None
        return self.size - self.reserve


__all__ = ["Limit", "Place", "room_on_card"]
