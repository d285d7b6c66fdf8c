"""The one thread that computes: it takes what waits for the same model as a batch, and hands out pieces as they come.

Batches are static: the first one waits a few milliseconds for others of its model, and who comes later waits for its
end. Whoever hangs up leaves the batch at the next token. Nothing of what is asked or answered is logged.
"""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from qd2mora.errors import StopError
from qd2mora.evaluation.decoding import Chosen, Decoding, Wanted
from qd2mora.evaluation.subject import Subject

WAIT_S = 0.005
"""How long a batch waits for others."""
_FAILURES = (StopError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, OSError)
"""Whatever goes wrong with one batch is its own clients' trouble: the thread goes on. torch's are RuntimeErrors."""


@dataclass(frozen=True)
class Token:
    """A token as it is told: its text, and those of the likeliest."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """News of one answer: text that can be shown, its tokens where they are wanted, and how it ended."""

    number: int
    text: str = ""
    tokens: tuple[Token, ...] = ()
    finish: str | None = None
    num_tokens: int = 0
    error: str | None = None


@dataclass(eq=False)
class Job:
    """The answers that one client waits for. `tell` is called from the engine's thread."""

    subject: Subject
    wanted: Sequence[Wanted]
    tell: Callable[[Piece], None]
    with_tokens: bool = False
    deadline: float = float("inf")
    """By `time.monotonic`; what goes on then ends with `timeout`."""
    is_cancelled: threading.Event = field(default_factory=threading.Event)


class Engine:
    """Takes jobs and works them off."""

    def __init__(self, rows_at_once: int = 16, max_waiting: int = 64) -> None:
        self.rows_at_once, self.max_waiting = rows_at_once, max_waiting
        self.num_running = 0
        """Rows of the batch that is on its way."""
        self._jobs: queue.Queue[Job | None] = queue.Queue()
        self._kept: list[Job] = []
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop(self) -> None:
        """End when the jobs at hand are done."""
        self._jobs.put(None)
        self._thread.join()

    @property
    def num_waiting(self) -> int:
        """Jobs that no batch has taken yet."""
        return self._jobs.qsize() + len(self._kept)

    def submit(self, job: Job) -> bool:
        """Take a job; False where too many wait."""
        if self.num_waiting >= self.max_waiting:
            return False
        self._jobs.put(job)
        return True

    def _work(self) -> None:
        goes_on = True
        while goes_on or self._kept:
            jobs, is_last = self._gather(goes_on)
            goes_on = goes_on and not is_last
            if jobs:
                self._run(jobs)

    def _gather(self, goes_on: bool) -> tuple[list[Job], bool]:
        """Return jobs of one model that fit one batch, and whether no more will come."""
        if not self._kept and goes_on:
            first = self._jobs.get()
            if first is None:
                return [], True
            self._kept.append(first)
        is_last, until = False, time.monotonic() + WAIT_S
        while goes_on and not is_last:
            try:
                job = self._jobs.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
            if job is None:
                is_last = True
            else:
                self._kept.append(job)
        # Who hung up while waiting costs no batch.
        self._kept = [job for job in self._kept if not job.is_cancelled.is_set()]
        # The oldest leads, whatever its model, so that none is passed over for ever; a job's rows are never parted.
        taken: list[Job] = []
        for job in self._kept:
            rows = sum(len(each.wanted) for each in taken) + len(job.wanted)
            if not taken or (job.subject is taken[0].subject and rows <= self.rows_at_once):
                taken.append(job)
        self._kept = [job for job in self._kept if job not in taken]
        return taken, is_last

    def _run(self, jobs: list[Job]) -> None:
        rows = [(job, number) for job in jobs for number in range(len(job.wanted))]
        try:
            with jobs[0].subject.writing():
                self._decode(Decoding(jobs[0].subject, [job.wanted[number] for job, number in rows]), rows)
        except _FAILURES as error:
            # A message of ours says what is wrong; one of torch's may be long, and no prompt is in either.
            words = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
            if isinstance(error, torch.OutOfMemoryError):
                words = "there is not enough memory for this; ask for fewer or shorter answers"
            for job, number in rows:
                job.tell(Piece(number, finish="error", error=words))
        finally:
            self.num_running = 0

    def _decode(self, decoding: Decoding, rows: Sequence[tuple[Job, int]]) -> None:
        while not decoding.is_done:
            for place, (job, _) in enumerate(rows):
                if job.is_cancelled.is_set():
                    decoding.cancel(place)
                elif time.monotonic() > job.deadline and decoding.answers[place].finish is None:
                    decoding.answers[place].finish = "timeout"
                    decoding.cancel(place)
                    _tell(decoding, place, rows[place])
            self.num_running = len(decoding.live)
            if decoding.is_done:
                return
            for place in decoding.step():
                _tell(decoding, place, rows[place])


def _tell(decoding: Decoding, place: int, row: tuple[Job, int]) -> None:
    job, number = row
    answer = decoding.answers[place]
    text = answer.news()
    tokens: tuple[Token, ...] = ()
    if job.with_tokens and answer.chosen and answer.chosen[-1].token not in answer.ends.ids:
        tokens = (_told(decoding.subject, answer.chosen[-1]),)
    if text or tokens or answer.finish:
        job.tell(Piece(number, text, tokens, answer.finish, answer.num_tokens))


def _told(subject: Subject, chosen: Chosen) -> Token:
    decode = subject.tokenizer.decode
    top = tuple((str(decode([token])), logprob) for token, logprob in chosen.top)
    return Token(str(decode([chosen.token])), chosen.logprob, top)


__all__ = ["Engine", "Job", "Piece", "Token"]
