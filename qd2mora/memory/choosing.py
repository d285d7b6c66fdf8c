"""Choosing: of all settings that the recipe leaves open, the fastest one that is predicted to fit.

Predicted time a token, in passes over it on a busy device: a frozen base takes two, forward and backward, and
recomputed layers their part of a third; each pass has work that does not grow with tokens (every weight is dequantised,
kernels are launched), worth FIXED_TOKENS tokens. So keeping activations wins wherever its micro batch is not much the
smaller. A streamed base is copied twice a micro batch, which hides behind the computing where there are tokens enough.
The other techniques cost little, and are taken in the order of what they cost.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch

from qd2mora.base.passes import CHUNK
from qd2mora.errors import InputRefused
from qd2mora.memory.ledger import Setting, ledger
from qd2mora.memory.shapes import Shapes
from qd2mora.recipe import Recipe

GIB = 1 << 30
LARGEST_MICRO_BATCH = 8
SMALL_CHUNK = 256
FIXED_TOKENS = 256
COPY_PASSES = 1350
"""One copy of all layers in token passes: 3 GiB of a 7B at 25 GB/s beside 22,000 tokens a second and pass."""
STREAMED, OFFLOADED, SMALL_CHUNKED, HOST_EMBEDDED, IN_8_BITS = 0.1, 0.02, 0.01, 0.003, 0.001
"""Shares of a step that a technique costs besides."""
KEPT_WITHOUT_BUDGET = GIB
"""Activations that are kept without asking where no budget is named and none can be read."""


def predicted_cost(setting: Setting, max_length: int, num_layers: int) -> float:
    """Return the predicted time of a token, in passes over it on a busy device."""
    tokens, share = setting.micro_batch * max_length, setting.recomputed / num_layers
    cost = (2 + share) * (1 + FIXED_TOKENS / tokens)
    if setting.stream:
        cost = max(cost, 2 * COPY_PASSES / tokens) * (1 + STREAMED)
    cost *= 1 + (OFFLOADED * share if setting.offload_activations else 0)
    cost *= 1 + (SMALL_CHUNKED if setting.loss_chunk < CHUNK else 0)
    cost *= 1 + (HOST_EMBEDDED if setting.offload_embeddings else 0)
    return cost * (1 + (IN_8_BITS if setting.optimizer != "adamw" else 0))


@dataclass(frozen=True)
class Search:
    """Where settings are looked for."""

    shapes: Shapes
    recipe: Recipe
    dtype: torch.dtype
    on_gpu: bool

    def peak(self, setting: Setting) -> int:
        """Return the bytes of a setting's peak."""
        return ledger(self.shapes, self.recipe, setting).peak_bytes

    def cost(self, setting: Setting) -> float:
        """Return the predicted time of a token."""
        return predicted_cost(setting, self.recipe.data.max_length, self.shapes.num_layers)

    def choose(self, limit: int | None) -> tuple[Setting, bool]:
        """Return the fastest setting that fits, or the smallest, and whether it fits. Raises InputRefused."""
        refuse_unfit(self.recipe, self.shapes)
        settings = list(self._settings())
        if limit is None:
            return self._without_limit(settings), True
        best: Setting | None = None
        # At their fastest first, so that most need no look at their memory.
        for setting in sorted(settings, key=self.cost):
            if best is None or self.cost(setting) < self.cost(best):
                found = self._fewest_recomputed(setting, limit)
                if found is not None and (best is None or self.cost(found) < self.cost(best)):
                    best = found
        if best is not None:
            return best, True
        return min((self._smallest(setting) for setting in settings), key=self.peak), False

    def _settings(self) -> Iterator[Setting]:
        """Yield what may be combined; recomputed layers at their fewest."""
        recipe, offload, tied = self.recipe, self.recipe.memory.offload, not self.shapes.head_entries
        chunk = recipe.memory.loss_chunk
        sizes, optimizer = ([CHUNK, SMALL_CHUNK] if chunk == "auto" else [chunk]), recipe.train.optimizer
        moments = ["adamw", "adamw_8bit"] if optimizer == "auto" else [optimizer]
        for micro_batch, loss_chunk, moment, activations, embeddings, weights in product(
            self._micro_batches(),
            sizes,
            moments,
            self._places(offload.activations, recipe.memory.checkpointing != "off"),
            self._places(offload.embeddings, not tied and recipe.memory.engine == "none"),
            self._places(offload.weights, recipe.memory.engine == "none" and not reads_weights_at_start(recipe)),
        ):
            setting = Setting(micro_batch, 0, self.dtype, self.on_gpu, loss_chunk, moment)
            yield replace(
                setting,
                recomputed=self._recomputed(activations)[0],
                offload_activations=activations,
                offload_embeddings=embeddings,
                stream=weights,
            )

    def _places(self, asked: str, is_possible: bool) -> list[bool]:
        """Return whether something may leave the device; beside a CPU there is nowhere to go."""
        if asked == "auto":
            return [False, True] if self.on_gpu and is_possible else [False]
        return [asked != "none"]

    def _recomputed(self, offloads: bool) -> tuple[int, int]:
        """Return the fewest and the most layers that may be recomputed."""
        asked, num_layers = self.recipe.memory.checkpointing, self.shapes.num_layers
        if asked == "auto":
            return (1 if offloads else 0), num_layers
        number = {"on": num_layers, "off": 0}[asked] if isinstance(asked, str) else min(asked, num_layers)
        return number, number

    def _fewest_recomputed(self, setting: Setting, limit: int) -> Setting | None:
        """Recompute as few layers as fit; the peak does not grow with their number."""
        fewest, most = self._recomputed(setting.offload_activations)
        if self.peak(replace(setting, recomputed=most)) > limit:
            return None
        while fewest < most:
            middle = (fewest + most) // 2
            if self.peak(replace(setting, recomputed=middle)) <= limit:
                most = middle
            else:
                fewest = middle + 1
        return replace(setting, recomputed=most)

    def _smallest(self, setting: Setting) -> Setting:
        return replace(setting, recomputed=self._recomputed(setting.offload_activations)[1])

    def _without_limit(self, settings: list[Setting]) -> Setting:
        """Take the largest micro batch and the fastest setting; recompute where activations are large."""
        keeping = min(settings, key=lambda setting: (-setting.micro_batch, self.cost(setting)))
        written = ledger(self.shapes, self.recipe, keeping)
        activations = (written.items | written.elsewhere).get("activations", 0)
        return self._smallest(keeping) if activations > KEPT_WITHOUT_BUDGET else keeping

    def _micro_batches(self) -> list[int]:
        asked, rows = self.recipe.train.micro_batch, self.recipe.train.global_batch
        if isinstance(asked, int):
            return [asked]
        return [size for size in range(min(rows, LARGEST_MICRO_BATCH), 0, -1) if rows % size == 0]


def reads_weights_at_start(recipe: Recipe) -> bool:
    """Tell whether the adapter is made of the frozen weights before training, all of which must then be there."""
    shared = recipe.adapter.shared
    return recipe.adapter.method == "dora" or (shared is not None and shared.init in ("pissa", "olora", "loftq"))


def refuse_unfit(recipe: Recipe, shapes: Shapes) -> None:
    """Refuse what cannot be combined. Raises InputRefused."""
    offload = recipe.memory.offload
    if offload.activations == "cpu" and recipe.memory.checkpointing == "off":
        raise InputRefused(
            "memory.offload.activations: cpu will not do: inputs of recomputed layers are what leaves, and "
            "memory.checkpointing: off recomputes none"
        )
    if offload.embeddings == "cpu" and not shapes.head_entries:
        raise InputRefused(
            "memory.offload.embeddings: cpu will not do: the output head of this base is tied to the embedding and "
            "needs it on the device; use none"
        )
    streams = offload.weights == "stream" and recipe.memory.zero_stage == 2  # ZeRO-3 does it in its own way
    if recipe.memory.engine != "none" and (streams or offload.embeddings == "cpu"):
        raise InputRefused(
            f"memory.engine: {recipe.memory.engine} puts the whole base on the device; use "
            "memory.offload.weights=none memory.offload.embeddings=none, or memory.engine=none"
        )
    if offload.weights == "stream" and reads_weights_at_start(recipe):
        raise InputRefused(
            "memory.offload.weights: stream will not do: this adapter is made of the frozen weights before training, "
            "which must all be there; use none"
        )


__all__ = ["GIB", "KEPT_WITHOUT_BUDGET", "LARGEST_MICRO_BATCH", "Search", "predicted_cost", "reads_weights_at_start"]
