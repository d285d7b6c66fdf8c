"""Ways to answer beside a model alone and greedily: contrasted, with others, and drawn several times and voted on."""

import logging
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from qd2mora.base.passes import device_of
from qd2mora.data import Row
from qd2mora.disk.file_hash import hash_of_file
from qd2mora.errors import InputRefused
from qd2mora.evaluation.answering import Weighed, answer_losses, weigh_apart, weigh_choices
from qd2mora.evaluation.contrast import Contrast
from qd2mora.evaluation.decoding import Decoding, Wanted, check_temperature
from qd2mora.evaluation.ensemble import Ensemble, EnsembleOptions, calibrations, read_triggers
from qd2mora.evaluation.joint import JointDecoding
from qd2mora.evaluation.shared_bases import SharedBases
from qd2mora.evaluation.subject import SPANS_ARE_MISSING, Subject, model_mark, open_subject
from qd2mora.evaluation.suites import extracted
from qd2mora.evaluation.votes import TEMPERATURE, Vote, majority

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Way:
    """How answers are written. `samples`: how many are drawn, at `temperature`, and voted on.

    extract: what counts of a text, the first match of this pattern (its first group where it has one); else all of it.
    gates_every: tokens of an answer that gates are decided for at once.
    """

    contrast: Contrast | None = None
    samples: int = 1
    temperature: float = 0.0
    seed: int = 0
    extract: str | None = None
    ensemble: EnsembleOptions | None = None
    gates_every: int = 1
    together: Ensemble | None = None
    """The ensemble's models, once they are open (`open_in_way`)."""

    def __post_init__(self) -> None:
        check_pattern(self.extract)
        check_temperature(self.temperature)
        if self.contrast is not None and self.ensemble is not None:
            raise InputRefused("--contrast: one adapter is set apart from its weak form; leave out --ensemble")
        if self.gates_every > 1 and (self.contrast is not None or self.ensemble is not None):
            raise InputRefused("--gates-every: gates are kept for one model that answers alone, as it is")
        if self.samples > 1 and self.temperature == 0:
            # At temperature 0 all samples would be one.
            object.__setattr__(self, "temperature", TEMPERATURE)

    @property
    def is_plain(self) -> bool:
        """Whether it is a model alone, once."""
        is_alone = self.contrast is None and self.ensemble is None and self.gates_every == 1
        return is_alone and self.samples == 1 and self.temperature == 0

    @property
    def question(self) -> dict[str, object]:
        """What answers in this way depend on, in plain values, files and models by their hashes."""
        assert self.together is None
        told = asdict(self)
        del told["together"]
        if self.gates_every == 1:  # as answers from before it were asked for
            del told["gates_every"]
        if self.ensemble is not None:
            files = [path for path in (self.ensemble.calibrate, self.ensemble.triggers) if path is not None]
            told["ensemble"] = [model_mark(other) for other in self.ensemble.others]
            told["ensemble"] += [self.ensemble.mix, *(hash_of_file(path) for path in files)]
        return told

    def decoding(self, subject: Subject, wanted: Sequence[Wanted]) -> Decoding | JointDecoding:
        """Return texts on their way. Raises InputRefused where the subject cannot write so."""
        if self.together is not None:
            weights = [self.together.weights(each.ids, _told(subject, each)) for each in wanted]
            return JointDecoding(self.together.voices, self.together.blend_of(weights), wanted)
        if self.contrast is None:
            return Decoding(subject, wanted)
        return JointDecoding(self.contrast.voices(subject), self.contrast.blend, wanted)

    def losses(self, subject: Subject, rows: list[Row]) -> list[float]:
        """Return the summed cross-entropy of each row's answer, in nats: the model's, or the ensemble's."""
        if self.together is None:
            return answer_losses(subject, rows)
        return self.together.answer_losses(rows)

    def weigh(self, subject: Subject, rows: list[Row], choices: list[list[list[int]]]) -> list[list[Weighed]]:
        """Weigh each row's choices, by the model or by the ensemble."""
        if self.together is None:
            return weigh_choices(subject, rows, choices)
        return weigh_apart(self.together.answer_losses, rows, choices)

    def votes(self, subject: Subject, wanted: Sequence[Wanted], answer_of: Callable[[str], str]) -> list[Vote]:
        """Return what comes of each text, all samples of all side by side."""
        # Seeds one after another: the first sample is what is drawn alone at this temperature.
        drawn = [replace(each, seed=each.seed + number) for each in wanted for number in range(self.samples)]
        decoding = self.decoding(subject, drawn)
        with subject.writing():
            while not decoding.is_done:
                decoding.step()
        texts = [answer.text for answer in decoding.answers]
        parts = [texts[start : start + self.samples] for start in range(0, len(texts), self.samples)]
        return [majority(each, answer_of) for each in parts]

    def answers(
        self, subject: Subject, rows: Sequence[Row], max_new_tokens: int, answer_of: Callable[[str], str]
    ) -> list[Vote]:
        """Return what is written after each row's prompt."""
        wanted = [
            Wanted(
                row.ids[: row.masked].tolist(),
                subject.ends,
                max_new_tokens,
                temperature=self.temperature,
                seed=self.seed,
                task=row.task,
                vector=row.pair.vector,
            )
            for row in rows
        ]
        return self.votes(subject, wanted, answer_of)

    def answer_of(self, text: str) -> str:
        """Return what counts of a text: its match of `extract`, else its words."""
        if self.extract is not None:
            return extracted(self.extract, text)
        return " ".join(text.split())


def _told(subject: Subject, wanted: Wanted) -> dict[str, Tensor]:
    device = device_of(subject.plain)
    told = {"task_index": torch.tensor([wanted.task], device=device)}
    if wanted.vector is not None:
        told["external"] = torch.tensor([wanted.vector], device=device)
    return told


def check_pattern(pattern: str | None) -> None:
    """Refuse what is no regular expression. Raises InputRefused."""
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise InputRefused(f"--extract: '{pattern}' is no regular expression: {error}") from None


def contrast_of(weak: str | None, beta: float | None, alpha: float | None) -> Contrast | None:
    """Return the contrast that options ask for. Raises InputRefused."""
    if weak is not None:
        return Contrast(weak, 0.5 if beta is None else beta, 0.1 if alpha is None else alpha)
    if beta is not None or alpha is not None:
        raise InputRefused("--beta, --alpha: go with --contrast; name base, top1 or uniform")
    return None


def ensemble_of(
    others: Sequence[str] | None, calibrate: Path | None, triggers: Path | None, mix: str | None
) -> EnsembleOptions | None:
    """Return the ensemble that options ask for. Raises InputRefused."""
    if others is not None:
        return EnsembleOptions(tuple(others), calibrate, triggers, mix or "composite")
    if calibrate is not None or triggers is not None or mix is not None:
        raise InputRefused("--calibrate, --triggers, --mix: go with --ensemble; name runs that answer beside the model")
    return None


def way_of(
    contrast: Contrast | None,
    ensemble: EnsembleOptions | None = None,
    *,
    samples: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    extract: str | None = None,
    gates_every: int = 1,
) -> Way | None:
    """Return the way that options ask for, None for a model alone and once. Raises InputRefused."""
    if contrast is None and ensemble is None and samples == gates_every == 1 and extract is None:
        return None
    return Way(contrast, samples, temperature, seed, extract, ensemble, gates_every)


def open_in_way(model: str | Path, way: Way | None, allow_changed: Collection[str] = ()) -> tuple[Subject, Way | None]:
    """Open a model, and what answers beside it; how members were calibrated is logged. Raises InputRefused."""
    if way is None or way.ensemble is None:
        subject = open_subject(model, allow_changed)
        if way is not None and subject.reads_spans:
            raise InputRefused(SPANS_ARE_MISSING)
        return (subject if way is None else subject.keeping_gates(way.gates_every)), way
    # Adapters of one base share its weights: an ensemble takes little more memory than one of them.
    options, bases = way.ensemble, SharedBases()
    members = [open_subject(path, allow_changed, bases) for path in (model, *options.others)]
    names = [str(model), *options.others]
    if any(member.reads_spans for member in members):
        raise InputRefused(f"--ensemble: {SPANS_ARE_MISSING}")
    for name, member in zip(names[1:], members[1:], strict=True):
        if member.run is not None and (member.run.routers.reads_task or member.run.routers.reads_vector):
            raise InputRefused(f"--ensemble: '{name}' reads the task or a vector of its own rows, which others lack")
    temperatures, triggers = [1.0] * len(members), list[list[list[int]]]([[] for _ in members])
    if options.calibrate is not None:
        for number, found in enumerate(calibrations(members, options.calibrate)):
            temperatures[number] = found.temperature
            _log.warning("%s: %s", names[number], found.line)
    if options.triggers is not None:
        triggers = read_triggers(options.triggers, names, members[0])
    return members[0], replace(way, together=Ensemble(members, temperatures, triggers, options.mix))


__all__ = ["Way", "check_pattern", "contrast_of", "ensemble_of", "open_in_way", "way_of"]
