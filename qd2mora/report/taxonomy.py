"""The methods by the words of the field's survey, derived from their rows.

Source: A Survey on Mixture of Experts (arXiv 2407.06204): gates are `dense` (all experts), `sparse` (a choice of them)
or `soft` (experts are merged into one before they are used, or by weights that read nothing); experts of ours are all
of its class PEFT, and lie in attention, in MLPs or in both.
"""

from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

from qd2mora.mixture.method import ATTENTION, MLP, Method
from qd2mora.mixture.presets import METHODS
from qd2mora.routed.gate import Gate

NONE = "-"
_PLACES = {"linear": "linears", "block": "beside blocks", "mlp": "whole MLPs"}


@dataclass(frozen=True)
class Taxon:
    """One method in the survey's words; where gates differ, the down gate's word first."""

    gate: str
    input: str
    granularity: str
    selection: str
    placement: str


def taxon_of(method: Method) -> Taxon:
    """Return a method's place in the taxonomy."""
    gates = list(method.gates.values())
    return Taxon(
        gate=_joined([_class(role, gate) for role, gate in method.gates.items()]),
        input=_joined([gate.input for gate in gates]),
        # A weight that reads nothing, or a task, is one for all tokens.
        granularity=_joined([gate.granularity if gate.input != "none" else "module" for gate in gates]),
        selection=_joined([_selection(gate) for gate in gates]),
        placement=f"{_PLACES[method.placement]} of {_blocks(method)}",
    )


def _class(role: str, gate: Gate) -> str:
    if gate.input == "none" or role == "core":
        return "soft"
    return "dense" if gate.select == "all" else "sparse"


def _selection(gate: Gate) -> str:
    if gate.select in ("top_k", "sample"):
        return f"{'top' if gate.select == 'top_k' else 'sampled'}-{gate.top_k}"
    if gate.input == "span":
        return "by span"
    return {"entropy": f"top-p, {gate.top_k} at least", "fixed": "by task"}.get(gate.select, gate.select)


def _blocks(method: Method) -> str:
    inside = set(method.targets)
    of_attention = bool(inside & set(ATTENTION)) and method.placement == "linear"
    of_mlp = bool(inside & set(MLP)) or method.placement != "linear"
    # Linears of one expert have no gate: the mixture is elsewhere.
    of_attention = of_attention and not inside & set(ATTENTION) <= set(method.one_expert)
    return " and ".join(name for name, is_one in (("attention", of_attention), ("MLP", of_mlp)) if is_one)


def _joined(words: list[str]) -> str:
    return ", ".join(dict.fromkeys(words)) or NONE


def show_taxonomy(console: Console) -> None:
    """Print all methods, a column for each of the survey's questions."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for heading in ("method", "class", "input", "granularity", "selection", "placement", "depends on"):
        table.add_column(heading)
    for method in METHODS.values():
        taxon = taxon_of(method)
        words = (taxon.gate, taxon.input, taxon.granularity, taxon.selection, taxon.placement)
        table.add_row(method.name, *words, method.gates.depends_on)
    console.print(table)
    console.print("class: dense (all experts), sparse (a choice), soft (merged into one); -: nothing is routed")


__all__ = ["NONE", "Taxon", "show_taxonomy", "taxon_of"]
