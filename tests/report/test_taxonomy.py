"""The survey's taxonomy is derived from the methods' rows, and says what their authors say."""

import io

import pytest
from rich.console import Console

from qd2mora.mixture.presets import METHODS, find_method
from qd2mora.report.taxonomy import Taxon, show_taxonomy, taxon_of


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("d2mora", Taxon("dense", "x, z", "token", "all", "linears of attention")),
        ("lora", Taxon("-", "-", "-", "-", "linears of attention")),
        ("loramoe", Taxon("dense", "x", "token", "all", "linears of MLP")),
        ("mixlora", Taxon("sparse", "x", "token", "top-2", "whole MLPs of MLP")),
        ("llava_mole", Taxon("sparse", "x", "token", "top-1", "linears of MLP")),
        ("mola", Taxon("sparse", "x", "token", "top-2", "linears of attention and MLP")),
        ("comol", Taxon("soft", "z", "token", "all", "linears of attention and MLP")),
        ("moelora", Taxon("dense", "task", "task", "all", "linears of attention")),
        ("cat", Taxon("soft", "none", "module", "all", "linears of attention")),
        ("dynmole", Taxon("sparse", "x", "token", "top-p, 2 at least", "linears of MLP")),
        ("flylora", Taxon("sparse", "self", "token", "top-8", "linears of attention and MLP")),
    ],
)
def test_a_method_has_the_words_that_its_row_says(name: str, wanted: Taxon) -> None:
    assert taxon_of(find_method(name)) == wanted


def test_every_method_has_a_line_of_the_table() -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    show_taxonomy(console)
    said = console.export_text()
    for name, method in METHODS.items():
        (line,) = [line for line in said.splitlines() if line.split()[:1] == [name]]
        assert method.gates.depends_on in line and taxon_of(method).placement in line
