"""Several adapters that answer together: calibrated, weighed by what the prompt names, mixed or taking turns.

With member a's scores s_a, temperature T_a and weight w_a: `composite`, sum_a w_a log softmax(s_a / T_a) (W-Composite);
`switch`, each token is one member's, as often as its weight says (W-Switch). Where members have trigger words, w is the
softmax over the members whose words the prompt has of how much likelier the adapter makes them there: the mean of
log p_a - log p_base over their tokens. A reconstruction: the paper's code was not published, and weighs by attention.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qd2mora.base.passes import device_of, label_states, labels_of, output_head
from qd2mora.data import Row, prepare
from qd2mora.errors import InputRefused
from qd2mora.evaluation.answering import batch_of
from qd2mora.evaluation.calibration import Calibration, calibrated
from qd2mora.evaluation.joint import Step, Voice
from qd2mora.evaluation.subject import Subject
from qd2mora.recipe import Data, Task
from qd2mora.recipe.yaml_file import read_mapping

MIXES = ("composite", "switch")
CALIBRATION_ROWS = 512


@dataclass(frozen=True)
class EnsembleOptions:
    """others: runs or adapters beside the model asked. calibrate: a file of rows; triggers: YAML, words of each."""

    others: tuple[str, ...]
    calibrate: Path | None = None
    triggers: Path | None = None
    mix: str = "composite"

    def __post_init__(self) -> None:
        if self.mix not in MIXES:
            raise InputRefused(f"--mix: '{self.mix}' will not do: {' or '.join(MIXES)}")
        if not self.others:
            raise InputRefused("--ensemble: name runs or adapters that answer beside the model, with commas between")


@dataclass(frozen=True)
class Ensemble:
    """Members on one base, each with a temperature and the tokens of its trigger words, one list for each word."""

    members: Sequence[Subject]
    temperatures: Sequence[float]
    triggers: Sequence[Sequence[list[int]]]
    mix: str = "composite"

    def __post_init__(self) -> None:
        first = self.members[0]
        for member in self.members[1:]:
            if member.tokenizer.get_vocab() != first.tokenizer.get_vocab():
                raise InputRefused("--ensemble: the members have different tokenizers: their tokens cannot be mixed")

    @property
    def voices(self) -> list[Voice]:
        return [Voice(member) for member in self.members]

    def weights(self, ids: Sequence[int], rows: Mapping[str, Tensor]) -> Tensor:
        """Return the members' weights for a prompt, (members,), which sum to one."""
        drops = [self._drop(number, ids, rows) for number in range(len(self.members))]
        # Whoever's words the prompt lacks gets exactly 0 below, by a softmax of -inf; where that is so of all, none is
        # to be preferred.
        if all(drop is None for drop in drops):
            return torch.full((len(drops),), 1 / len(drops))
        return torch.tensor([float("-inf") if drop is None else drop for drop in drops]).softmax(0)

    @torch.no_grad()
    def _drop(self, number: int, ids: Sequence[int], rows: Mapping[str, Tensor]) -> float | None:
        """Return how much likelier an adapter makes its own words where they stand; None where none of them does."""
        places = places_of(ids, self.triggers[number])
        member = self.members[number]
        if not places or not member.is_adapted:
            return None
        # The token at a place is predicted by the one before it.
        labels = torch.full((1, len(ids)), -100)
        labels[0, places] = torch.tensor([ids[place] for place in places])
        batch = {"input_ids": torch.tensor([list(ids)]), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64)}
        batch = {name: each.to(device_of(member.plain)) for name, each in (batch | {"labels": labels}).items()}
        member.route(dict(rows) | {name: batch[name] for name in ("labels", "attention_mask")})
        losses = [_token_losses(member, batch)]
        with member.without_adapter():
            losses.append(_token_losses(member, batch))
        return float((losses[1] - losses[0]).mean())

    def blended(self, scores_VTW: Tensor, weights_VT: Tensor) -> Tensor:
        """Return the mixed scores of tokens, (T, vocabulary), each token's with weights of its own."""
        temperature_V = torch.tensor(list(self.temperatures))[:, None, None]
        # Each member's own softmax first: logits of two models differ by a constant that means nothing, and
        # temperatures were fitted on probabilities.
        logs = (scores_VTW / temperature_V).log_softmax(-1)
        # A weight of zero takes a member out, also where it rules a token out: 0 times -inf is no number.
        return torch.where(weights_VT[..., None] > 0, weights_VT[..., None] * logs, 0.0).sum(0)

    def turn_weights(self, weight_V: Tensor, written: int) -> Tensor:
        """Return the weights of the next token: all members', or one member's whose turn it is."""
        if self.mix == "composite":
            return weight_V
        return torch.nn.functional.one_hot(
            torch.tensor(turns(weight_V.tolist(), written + 1)[-1]), len(weight_V)
        ).float()

    def blend_of(self, weights: Sequence[Tensor]) -> "_Blend":
        """Return the blend of texts with these weights."""
        return _Blend(self, weights)

    @torch.no_grad()
    def answer_losses(self, rows: Sequence[Row]) -> list[float]:
        """Return the summed cross-entropy of each row's answer under the mixed scores, in nats."""
        found = []
        for row in rows:
            scores, told = [], {}
            for member in self.members:
                told = batch_of(member, [row], "right")
                member.route(told)
                scores.append(output_head(member.plain)(label_states(member.plain, told)).float().cpu())
            labels = labels_of(told).cpu()
            weight_V = self.weights(row.ids[: row.masked].tolist(), of_row(told))
            weights = torch.stack([self.turn_weights(weight_V, place) for place in range(len(labels))], 1)
            mixed = self.blended(torch.stack(scores), weights)
            found.append(float(torch.nn.functional.cross_entropy(mixed, labels, reduction="sum")))
        return found


@dataclass(frozen=True)
class _Blend:
    ensemble: Ensemble
    weights: Sequence[Tensor]

    def __call__(self, scores_VW: Tensor, step: Step) -> Tensor:
        weight_V = self.ensemble.turn_weights(self.weights[step.text], step.written)
        return self.ensemble.blended(scores_VW[:, None], weight_V[:, None])[0]


def turns(weights: Sequence[float], number: int) -> list[int]:
    """Return whose each of the first tokens is: whoever is farthest behind its share, of equals the first."""
    counts, order = [0] * len(weights), []
    for written in range(1, number + 1):
        behind = [weight * written - count for weight, count in zip(weights, counts, strict=True)]
        # Rounded, so that shares that are equal but for their last digits take turns in the order of members.
        order.append(max(range(len(weights)), key=lambda member: (round(behind[member], 9), -member)))
        counts[order[-1]] += 1
    return order


def places_of(ids: Sequence[int], words: Sequence[list[int]]) -> list[int]:
    """Return where tokens of the words stand in a text, but for its first token, which nothing predicts."""
    found = set[int]()
    for word in words:
        starts = range(len(ids) - len(word) + 1)
        found |= {at + k for at in starts if list(ids[at : at + len(word)]) == word for k in range(len(word))}
    return sorted(found - {0})


def of_row(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what a batch says of its rows to routers, without their text."""
    return {name: batch[name] for name in ("task_index", "group", "external") if name in batch}


def calibrations(members: Sequence[Subject], path: Path) -> list[Calibration]:
    """Fit every member's temperature on a file of rows, in the format of the first one's tasks. Raises InputRefused."""
    first = members[0]
    task = Task(name="calibrate", path=str(path))
    data = Data(tasks=[task])
    if first.run is not None:
        own = first.run.recipe.data
        # Its limits and held-out rows are about the run's own file; all of this one is for calibration.
        task = own.tasks[0].model_copy(update={"path": str(path), "validation": 0, "limit": None, "select": None})
        data = own.model_copy(update={"tasks": [task], "stop": None})
    (rows,) = prepare(data, first.tokenizer, 0, None if first.run is None else first.run.clock)
    taken = list(rows.train[:CALIBRATION_ROWS])
    if len(taken) < 2:
        raise InputRefused(f"--calibrate: {path} has {len(taken)} rows; one half is fitted on, the other measured on")
    return [calibrated(member, taken) for member in members]


def read_triggers(path: Path, names: Sequence[str], tokenizer: Subject) -> list[list[list[int]]]:
    """Read each member's trigger words as tokens, as they stand within a text. Raises InputRefused."""
    content, found = read_mapping(path, "--triggers"), []
    for name in names:
        words = content.get(name)
        if not isinstance(words, list) or not words or not all(isinstance(word, str) and word for word in words):
            raise InputRefused(f"--triggers: {path} has no list of words for '{name}'; write '{name}: [word, ...]'")
        # Byte-level vocabularies have other tokens for a word at a line's start and one behind a space: both forms are
        # looked for.
        texts = [text for word in words for text in (word, f" {word}")]
        found.append(tokenizer.tokeniser.texts(texts, special=False))
    return found


def _token_losses(member: Subject, batch: Mapping[str, Tensor]) -> Tensor:
    logits = output_head(member.plain)(label_states(member.plain, batch)).float()
    return torch.nn.functional.cross_entropy(logits, labels_of(batch), reduction="none")


__all__ = [
    "MIXES",
    "Ensemble",
    "EnsembleOptions",
    "calibrations",
    "of_row",
    "places_of",
    "read_triggers",
    "turns",
]
