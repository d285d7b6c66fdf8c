"""The frozen model that a run is measured against: its own, without the adapter, or with the adapter it went on from.

No second model: while the reference speaks, adapters are off, or hold the tensors that the run began with. What it says
of a line does not change in a run, so it is computed once and kept on disk, under a hash of all that it depends on, in
entries of CHUNK rows: a start that finds some goes on with the rest.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn

from qd2mora.base.passes import device_of
from qd2mora.data import Row
from qd2mora.data.token_cache import VALUES, cache_folder, limit_bytes, mark_used, prune, remove_entry
from qd2mora.disk.file_hash import hash_of_bytes
from qd2mora.disk.passing import passing_name, remove_passing
from qd2mora.disk.sealed import seal_whole_folder, verify_folder
from qd2mora.disk.tensor_file import stored_tensors, tensor_at_hand, write_tensors
from qd2mora.errors import DamagedFile
from qd2mora.mixture import adapter_off, routing_of, selection_biases

CHUNK = 512
"""Rows of an entry."""
_NAME = "losses"
_log = logging.getLogger(__name__)


def line_key(line: Row) -> int:
    """Return a key of all of a line that a model reads: 63 bits of a hash."""
    said = f"{line.task} {line.group} {line.masked} {line.earlier} {line.pair.vector}"
    digest = hashlib.blake2b(said.encode() + b"\n" + line.ids.tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class Reference:
    """What the frozen model says of lines; `kept` holds what is known, by `line_key`."""

    def __init__(self, model: PeftModel, has_start: bool) -> None:
        """`has_start`: the adapter as it is now is the reference, else the base alone."""
        self.model, self.kept = model, dict[int, float]()
        self.start: dict[str, Tensor] = {}
        if has_start:
            self.start = {name: tensor.detach().clone() for name, tensor in _changing(model).items()}

    @contextmanager
    def speaking(self) -> Iterator[None]:
        """Be the reference while the block runs: no dropout, nothing counted, no gradient."""
        is_training, routing = self.model.training, routing_of(self.model)
        is_counted = routing is not None and routing.is_counted
        with ExitStack() as held:
            held.enter_context(torch.no_grad())
            held.enter_context(self._swapped() if self.start else adapter_off(self.model))
            self.model.eval()
            if routing is not None:
                routing.is_counted = False
            try:
                yield
            finally:
                self.model.train(is_training)
                if routing is not None:
                    routing.is_counted = is_counted

    def losses(self, lines: Sequence[Row], run: Callable[[], Tensor]) -> Tensor:
        """Return the summed cross-entropy of lines, (lines,) float32; `run` computes it where one is not known."""
        found = [self.kept.get(line_key(line)) for line in lines]
        known = [each for each in found if each is not None]
        if len(known) == len(found):
            return torch.tensor(known, dtype=torch.float32, device=device_of(self.model))
        with self.speaking():
            return run()

    @contextmanager
    def _swapped(self) -> Iterator[None]:
        """Let the adapter hold what the run began with."""
        now = {name: tensor for name, tensor in self.model.named_parameters() if name in self.start}
        held = {name: tensor.data for name, tensor in now.items()}
        for name, tensor in now.items():
            # By `data`: the parameter stays the one that the optimiser and PEFT hold.
            tensor.data = self.start[name].view(tensor.shape)
        try:
            yield
        finally:
            for name, tensor in now.items():
                tensor.data = held[name]


def _changing(model: PeftModel) -> dict[str, nn.Parameter]:
    """Return the tensors that a run changes, by name."""
    trained = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    return trained | selection_biases(model)


class KeptLosses:
    """Losses on disk; `made_of`: all that they depend on beside the rows themselves."""

    def __init__(self, made_of: Mapping[str, object]) -> None:
        self.folder = cache_folder("reference")
        self._head = json.dumps({"version": 1, **made_of}, sort_keys=True)

    def read(self, lines: Sequence[Row]) -> list[float] | None:
        """Return the losses of these lines, None where they are not there or not whole."""
        place = self._place(lines)
        if not place.exists():
            return None
        try:
            verify_folder(place)
            values = stored_tensors([place / VALUES])[_NAME].read()
        except (DamagedFile, OSError, KeyError) as error:
            _log.warning("what the reference says is computed anew: %s", error)
            remove_entry(place)
            return None
        if values.shape != (len(lines),):
            return None
        mark_used(place)
        return [float(value) for value in values]

    def write(self, lines: Sequence[Row], losses: Sequence[float]) -> None:
        """Keep losses; a disk that is full or not writable costs a line, and no more."""
        place, limit = self._place(lines), limit_bytes()
        stage = passing_name(place)
        try:
            stage.mkdir(parents=True)
            tensor = torch.tensor(losses, dtype=torch.float32)
            written = write_tensors(stage / VALUES, [tensor_at_hand(_NAME, tensor)])
            seal_whole_folder(stage, {VALUES: written}, {})
            if not place.exists():
                os.rename(stage, place)
            prune(self.folder, place, limit)
        except OSError as error:
            _log.warning("what the reference says is not kept in '%s': %s", self.folder, error.strerror or error)
        finally:
            remove_passing(stage)

    def _place(self, lines: Sequence[Row]) -> Path:
        keys = " ".join(str(line_key(line)) for line in lines)
        return self.folder / hash_of_bytes(f"{self._head}\n{keys}".encode())[:32]


__all__ = ["CHUNK", "KeptLosses", "Reference", "line_key"]
