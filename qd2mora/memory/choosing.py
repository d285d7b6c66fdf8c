"""Choosing: of all layouts that the recipe leaves open, the fastest one that is predicted to fit.

Predicted time a token, in passes over it on a busy device: a frozen base takes two, forward and backward, and
recomputed layers their part of a third; each pass has work that does not grow with tokens (every weight is dequantised,
kernels are launched), worth FIXED_TOKENS tokens. So keeping activations wins wherever its micro batch is not much the
smaller. A streamed base is copied twice a micro batch, or for all that take turns in each layer, which hides behind the
computing where there are tokens enough.
The other techniques cost little, and are taken in the order of what they cost.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from qd2mora.memory.ledger import ledger
from qd2mora.memory.streaming import SLOTS
from qd2mora.memory.techniques import TECHNIQUES, Case, Layout, refuse_unfit
from qd2mora.memory.writing import texts_at_first

GIB = 1 << 30
LARGEST_MICRO_BATCH = 8
FIXED_TOKENS = 256
COPY_PASSES = 1350
"""One copy of all layers in token passes: 3 GiB of a 7B at 25 GB/s beside 22,000 tokens a second and pass."""
KEPT_WITHOUT_BUDGET = GIB
"""Activations that are kept without asking where no budget is named and none can be read."""


def predicted_cost(layout: Layout, max_length: int, num_layers: int) -> float:
    """Return the predicted time of a token, in passes over it on a busy device."""
    # Copies run beside the computing, so that the slower of the two is what a token takes.
    cost = max(_computing(layout, max_length, num_layers), _copying(layout, max_length, num_layers))
    for technique in TECHNIQUES:
        cost *= 1 + technique.cost(layout, layout.recomputed / num_layers)
    return cost


def _computing(layout: Layout, max_length: int, num_layers: int) -> float:
    """Return what computing takes of a token's time, in passes over it."""
    return (2 + layout.recomputed / num_layers) * (1 + FIXED_TOKENS / (layout.micro_batch * max_length))


def _copying(layout: Layout, max_length: int, num_layers: int) -> float:
    """Return what copies of streamed layers take: all that do not stay, once forward and once backward."""
    if not layout.stream:
        return 0.0
    tokens = layout.at_once * layout.micro_batch * max_length
    return 2 * COPY_PASSES * (1 - layout.resident / num_layers) / tokens


@dataclass(frozen=True)
class Search:
    """Looks for the layout of a run."""

    case: Case

    def peak(self, layout: Layout) -> int:
        """Return the bytes of a layout's peak."""
        return ledger(self.case.shapes, self.case.recipe, layout).peak_bytes

    def texts(self, layout: Layout, limit: int | None) -> int:
        """Return how many answers are written at once where that fits; halved as a run does it that runs out."""
        texts = texts_at_first(self.case.recipe)
        while texts > 1 and limit is not None and self.writing_peak(layout, texts) > limit:
            texts = -(-texts // 2)
        return texts

    def writing_peak(self, layout: Layout, texts: int) -> int:
        """Return the bytes of a layout's peak where so many answers are written at once."""
        return ledger(self.case.shapes, self.case.recipe, layout, texts).peak_bytes

    def cost(self, layout: Layout) -> float:
        """Return the predicted time of a token."""
        return predicted_cost(layout, self.case.recipe.data.max_length, self.case.shapes.num_layers)

    def choose(self, limit: int | None, *, keeps_batch: bool = False) -> tuple[Layout, bool]:
        """Return the fastest layout that fits, or the smallest, and whether it fits. Raises InputRefused.

        `keeps_batch`: wherever recomputing makes it fit, the largest micro batch is taken, whose sums do not change
        with the room that there is.
        """
        refuse_unfit(self.case)
        layouts = list(self._layouts())
        if limit is None:
            return self._without_limit(layouts), True
        if keeps_batch:
            found = self._fewest_recomputed(replace(self._largest(layouts), resident=0), limit)
            if found is not None:
                return found, True
        best: Layout | None = None
        # At their fastest first, so that most need no look at their memory.
        for layout in sorted(layouts, key=self.cost):
            if best is None or self.cost(layout) < self.cost(best):
                for found in self._fitting(layout, limit):
                    if best is None or self.cost(found) < self.cost(best):
                        best = found
        if best is not None:
            return best, True
        return min((self._smallest(layout) for layout in layouts), key=self.peak), False

    def _layouts(self) -> Iterator[Layout]:
        """Yield what may be combined, at its fastest: the fewest layers recomputed, of streamed ones the most kept."""
        options = [technique.options(self.case, technique.asked(self.case.recipe)) for technique in TECHNIQUES]
        for micro_batch in self._micro_batches():
            for values in product(*options):
                layout = Layout(micro_batch, 0, self.case.dtype, self.case.on_gpu, masks=self.case.masks)
                for technique, value in zip(TECHNIQUES, values, strict=True):
                    layout = technique.applied(layout, value)
                if not self._makes_sense(layout):
                    continue
                yield replace(layout, recomputed=self._recomputed(layout)[0], resident=self._most_to_stay(layout))

    def _makes_sense(self, layout: Layout) -> bool:
        """Tell whether micro batches take turns where there are several, and where that is asked for or saves copies.

        Where it is asked for, and there is one, there is nothing to take turns.
        """
        recipe = self.case.recipe
        if not layout.rows_by_layer:
            return recipe.memory.accumulation != "layer" or layout.micro_batch == recipe.train.global_batch
        return layout.at_once > 1 and (layout.stream or recipe.memory.accumulation == "layer")

    def _recomputed(self, layout: Layout) -> tuple[int, int]:
        """Return the fewest and the most layers that may be recomputed; only inputs of such can leave the device."""
        asked, num_layers = self.case.recipe.memory.checkpointing, self.case.shapes.num_layers
        if layout.rows_by_layer:
            return num_layers, num_layers
        if asked == "auto":
            return int(layout.offload_activations), num_layers
        if asked == "on":
            return num_layers, num_layers
        if asked == "off":
            return 0, 0
        number = min(asked, num_layers)
        return number, number

    def _fewest_recomputed(self, layout: Layout, limit: int) -> Layout | None:
        """Recompute as few layers as fit; the peak does not grow with their number."""
        fewest, most = self._recomputed(layout)
        if self.peak(replace(layout, recomputed=most)) > limit:
            return None
        # More layers recomputed never take more memory: halving finds the fewest in a few looks at the ledger.
        while fewest < most:
            middle = (fewest + most) // 2
            if self.peak(replace(layout, recomputed=middle)) <= limit:
                most = middle
            else:
                fewest = middle + 1
        return replace(layout, recomputed=most)

    def _fitting(self, layout: Layout, limit: int) -> Iterator[Layout]:
        """Yield what a layout may become that fits, the fastest among them.

        The fewest recomputed, where copies hide behind the computing. Where they do not, recomputing makes room for
        layers that stay, and takes time as these save it: the best is where computing and copying take as long.
        """
        found = self._fewest_recomputed(replace(layout, resident=0), limit)
        if found is None:
            return
        if not found.stream:
            yield found
            return
        fewest, most = found.recomputed, self._recomputed(layout)[1]
        while fewest < most:
            middle = (fewest + most) // 2
            if self._waits_for_copies(self._most_resident(replace(layout, recomputed=middle), limit)):
                fewest = middle + 1
            else:
                most = middle
        for number in {max(found.recomputed, most - 1), most}:
            yield self._most_resident(replace(layout, recomputed=number), limit)

    def _waits_for_copies(self, layout: Layout) -> bool:
        length, num_layers = self.case.recipe.data.max_length, self.case.shapes.num_layers
        return _copying(layout, length, num_layers) > _computing(layout, length, num_layers)

    def _most_resident(self, layout: Layout, limit: int) -> Layout:
        """Keep as many layers on the device as fit beside what does; two at least are streamed."""
        if not layout.stream:
            return layout
        fewest, most = 0, self._most_to_stay(layout)
        while fewest < most:
            middle = (fewest + most + 1) // 2
            if self.peak(replace(layout, resident=middle)) <= limit:
                fewest = middle
            else:
                most = middle - 1
        return replace(layout, resident=fewest)

    def _most_to_stay(self, layout: Layout) -> int:
        """Return how many layers may stay where others are streamed: fewer than two would not take turns."""
        return max(0, self.case.shapes.num_layers - SLOTS) if layout.stream else 0

    def _smallest(self, layout: Layout) -> Layout:
        return replace(layout, recomputed=self._recomputed(layout)[1], resident=0)

    def _without_limit(self, layouts: list[Layout]) -> Layout:
        """Take the largest micro batch and the fastest layout; recompute where activations are large."""
        keeping = replace(self._largest(layouts), resident=0)
        written = ledger(self.case.shapes, self.case.recipe, keeping)
        activations = (written.items | written.elsewhere).get("activations", 0)
        # Nothing bounds the memory here, but a machine whose memory cannot be read may still be small.
        if activations > KEPT_WITHOUT_BUDGET:
            return self._smallest(keeping)
        return keeping

    def _largest(self, layouts: list[Layout]) -> Layout:
        return min(layouts, key=lambda layout: (-layout.micro_batch, self.cost(layout)))

    def _micro_batches(self) -> list[int]:
        asked, rows = self.case.recipe.train.micro_batch, self.case.recipe.train.global_batch
        if isinstance(asked, int):
            return [asked]
        # Sizes that divide a step's rows: a smaller last micro batch would take the fixed work of a whole one.
        return [size for size in range(min(rows, LARGEST_MICRO_BATCH), 0, -1) if rows % size == 0]


__all__ = ["GIB", "KEPT_WITHOUT_BUDGET", "LARGEST_MICRO_BATCH", "Search", "predicted_cost"]
