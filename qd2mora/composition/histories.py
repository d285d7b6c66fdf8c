"""Histories to vectors: what somebody did before becomes the vector by which RecLoRA's gate mixes experts for him.

After RecLoRA's retriever of long and short history (arXiv 2408.03533): of a row's whole history the items nearest to
what it asks are its long part, the latest items its short part. Each part is the mean of its items' embeddings (the
mean of the base's last states over an item's tokens, of length one), and the vector is the principal directions of both
parts side by side, over all rows of the file, whether a recipe then learns from all of them or from few.

Deviations: the authors take the user's representation from a recommender that was trained on all users, here nothing is
trained; a row without a history has the vector of zeros, the mean of all.

Shapes: N rows, I items, H hidden width, W width of the vector.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qd2mora.base import load_base, load_tokenizer
from qd2mora.composition.fit_router import prompt_contexts
from qd2mora.composition.inputs import Settings
from qd2mora.data import Row
from qd2mora.data.file_rows import BadRow, rows_of
from qd2mora.data.pair import Pair
from qd2mora.disk.durable import write_atomically
from qd2mora.disk.tensor_file import encoded, stored_tensors
from qd2mora.errors import InputRefused
from qd2mora.evaluation import Subject
from qd2mora.recipe import Recipe, Task
from qd2mora.safekeeping.places import already_there, check_place, write_beside

MOST_TOKENS = 256
"""Of an item, or of what is asked; the rest of a longer one is passed over."""


@dataclass(frozen=True)
class HistoryOptions:
    """field, query: names of the history, a list of texts, the oldest first, and of what is asked.

    width: of the vector. long, short: items nearest to what is asked, and latest ones. basis: directions of an earlier
    file, so that rows that came later have their vectors in the same coordinates.
    """

    field: str = "history"
    query: str = "instruction"
    width: int = 16
    long: int = 8
    short: int = 4
    basis: Path | None = None


@dataclass(frozen=True)
class Basis:
    """mean (2H,), directions (W, 2H), and what coordinates are divided by, so that their mean square is one."""

    mean: Tensor
    directions: Tensor
    scale: Tensor

    def vectors(self, parts: Tensor, has_history: Tensor) -> Tensor:
        """Return the vectors (N, W) of both parts (N, 2H); zeros where there is no history."""
        found = (parts - self.mean) @ self.directions.T / self.scale
        return found * has_history.unsqueeze(-1)


@dataclass(frozen=True)
class Histories:
    """What was written: how many rows, those without a history, how wide vectors are, and where directions lie."""

    rows: int
    empty: int
    width: int
    basis: Path
    kept: float | None
    """The share of the spread of both parts that is in the vectors, where directions are new."""


def histories(recipe: Recipe, rows_file: Path, options: HistoryOptions, out: Path) -> Histories:
    """Write the rows with a `vector` in the place of their history, and the directions beside them. InputRefused."""
    basis_file = out.with_suffix(".basis.safetensors")
    for place in (out, basis_file):
        check_place(place, "--out")
    if out.exists():
        raise already_there(out, "--out")
    rows = read_rows(rows_file, options)
    subject = Subject(load_base(recipe.base), load_tokenizer(recipe.base.model))
    parts = both_parts(subject, rows, options)
    has_history = torch.tensor([bool(row[options.field]) for row in rows])
    if not bool(has_history.any()):
        raise InputRefused(f"{rows_file}: no row has anything in its field '{options.field}'")
    kept = None
    if options.basis is None:
        basis, kept = fitted(parts[has_history], options.width)
    else:
        basis = read_basis(options.basis, parts.shape[1])
    vectors = basis.vectors(parts, has_history)
    lines = []
    for row, vector in zip(rows, vectors.tolist(), strict=True):
        told = {name: value for name, value in row.items() if name != options.field}
        lines.append(json.dumps(told | {"vector": [round(each, 6) for each in vector]}, ensure_ascii=False) + "\n")
    named = {"mean": basis.mean, "directions": basis.directions, "scale": basis.scale}
    content = b"".join(encoded({name: tensor.contiguous() for name, tensor in named.items()}))
    write_beside(basis_file, content, "--out")
    write_atomically(out, "".join(lines))
    return Histories(len(rows), int((~has_history).sum()), vectors.shape[1], basis_file, kept)


def read_rows(path: Path, options: HistoryOptions) -> list[Settings]:
    """Return the rows of a file, each with a list of texts and a text to ask. Raises InputRefused."""
    found: list[Settings] = []
    for place, row in rows_of(str(path), Task(name="histories", path=str(path))):
        if isinstance(row, BadRow) or not isinstance(row, dict):
            raise InputRefused(f"{path}, {place}: {row if isinstance(row, BadRow) else 'no row with fields'}")
        items = row.setdefault(options.field, [])
        if not isinstance(items, list) or not all(isinstance(each, str) for each in items):
            raise InputRefused(f"{path}, {place}: field '{options.field}' should be a list of texts, the oldest first")
        if not isinstance(row.get(options.query), str):
            raise InputRefused(f"{path}, {place}: no text in field '{options.query}'; name what is asked with --query")
        found.append(row)
    return found


def both_parts(subject: Subject, rows: Sequence[Settings], options: HistoryOptions) -> Tensor:
    """Return the long and the short part of each row side by side, (N, 2H) float64."""
    texts = sorted({text for row in rows for text in (*_items(row, options), str(row[options.query]))})
    number = {text: place for place, text in enumerate(texts)}
    known = embedded(subject, texts)
    found = []
    for row in rows:
        items = known[[number[text] for text in _items(row, options)]]
        found.append(torch.cat(parts_of_history(known[number[str(row[options.query])]], items, options)))
    return torch.stack(found)


def _items(row: Settings, options: HistoryOptions) -> list[str]:
    items = row[options.field]
    assert isinstance(items, list)
    return items


def parts_of_history(query_H: Tensor, items_IH: Tensor, options: HistoryOptions) -> tuple[Tensor, Tensor]:
    """Return the means of the items nearest to what is asked, and of the latest ones; zeros where there are none."""
    if not len(items_IH):
        return torch.zeros_like(query_H), torch.zeros_like(query_H)
    # Of equally near ones the later: a stable sort of the reversed list.
    near = (items_IH @ query_H).flip(0).sort(descending=True, stable=True).indices[: options.long]
    return items_IH.flip(0)[near].mean(0), items_IH[-options.short :].mean(0)


def embedded(subject: Subject, texts: Sequence[str]) -> Tensor:
    """Return the embedding of each text, (texts, H) float64 of length one."""
    ids = [
        np.asarray(each[:MOST_TOKENS], dtype=np.int32) for each in subject.tokeniser.texts(list(texts), special=True)
    ]
    # Sorted by length, so that a batch is padded little; put back by number.
    order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
    rows = [Row(0, ids[place], len(ids[place]), Pair(texts[place], "")) for place in order]
    states = prompt_contexts(subject, rows)
    found = torch.empty_like(states)
    found[torch.tensor(order)] = states
    return torch.nn.functional.normalize(found, dim=-1)


def fitted(parts: Tensor, width: int) -> tuple[Basis, float]:
    """Return the principal directions of parts (N, 2H), and the share of their spread that these hold."""
    mean = parts.mean(0)
    _, values, directions = torch.linalg.svd(parts - mean, full_matrices=False)
    # What rows span, and no rounding: beyond it a direction is noise.
    there = int((values > 1e-9 * values[:1].clamp_min(1e-300)).sum()) if float(values[0]) > 1e-9 else 0
    if width > there:
        raise InputRefused(f"--width: {width} will not do: the histories of these rows differ in {there} directions")
    # Of each direction the sign that makes its largest entry positive: a basis is the same wherever it is found.
    chosen = directions[:width]
    chosen = chosen * chosen.gather(1, chosen.abs().argmax(1, keepdim=True)).sign()
    scale = ((parts - mean) @ chosen.T).square().mean().sqrt()
    return Basis(mean, chosen, scale), float(values[:width].square().sum() / values.square().sum())


def read_basis(path: Path, width: int) -> Basis:
    """Read the directions of an earlier file. Raises InputRefused, DamagedFile."""
    if not path.is_file():
        raise InputRefused(f"--basis: no file '{path}'; an earlier run left one beside its rows")
    stored = stored_tensors([path])
    if set(stored) != {"mean", "directions", "scale"}:
        raise InputRefused(f"--basis: '{path}' holds no directions of histories")
    basis = Basis(*(stored[name].read() for name in ("mean", "directions", "scale")))
    if basis.mean.shape != (width,) or basis.directions.shape[1:] != (width,):
        raise InputRefused(f"--basis: '{path}' is of a base of width {basis.mean.numel() // 2}, not {width // 2}")
    return basis


__all__ = ["Basis", "Histories", "HistoryOptions", "embedded", "fitted", "histories", "parts_of_history"]
