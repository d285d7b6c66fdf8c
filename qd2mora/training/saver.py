"""Saving beside training: a copy of the small trainable state is taken, and written while the next steps run.

One save is in flight at a time. It has the guarantees of a save that is waited for: until its last rename the older
checkpoints are the newest. Where memory has no room for the copy, training waits.
"""

from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from qd2mora.base.host_memory import available_bytes
from qd2mora.errors import StopError
from qd2mora.training import checkpoint
from qd2mora.training.disk import as_trouble
from qd2mora.training.state import Progress, State, StateSource


@dataclass
class Saver:
    """Publishes checkpoints from the main process; the others only take part in collecting the state."""

    folder: Path
    keep: int
    source: StateSource
    is_main: bool = True
    _writer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "save"))
    _job: "Future[None] | None" = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the save in flight; what it has to say yields to an error that is on its way."""
        try:
            self.finish()
        except StopError:
            if error is None:
                raise
        finally:
            self._writer.shutdown()

    def save(self, progress: Progress) -> None:
        """Begin to save, after the one in flight has ended. Raises what that one raised."""
        self.finish()
        adapter, moments, scalars = self.source.collect(copied=True)
        if self.is_main:
            state = State(adapter, moments, scalars, replace(progress, best=dict(progress.best)))
            self._job = self._writer.submit(self._write, state)
            if not _has_room_for(state):
                wait([self._job])

    @property
    def has_failed(self) -> bool:
        """Whether the last save has ended badly: `finish` raises NotFinite, DiskTrouble, DamagedFile."""
        return self._job is not None and self._job.done() and self._job.exception() is not None

    def finish(self) -> None:
        """Wait for the save in flight. Raises what it raised."""
        job, self._job = self._job, None
        if job is not None:
            job.result()

    def _write(self, state: State) -> None:
        with as_trouble(f"checkpoint of step {state.progress.step}", self.folder):
            checkpoint.save(self.folder, state, self.keep)


def _has_room_for(state: State) -> bool:
    """Tell whether the copy leaves as much memory again to the rest of the machine."""
    size = sum(tensor.nbytes for tensor in (*state.adapter.values(), *state.moments.values()))
    return (available_bytes() or 0) > size


__all__ = ["Saver"]
