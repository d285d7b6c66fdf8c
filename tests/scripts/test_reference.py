"""The reference page of recipes: up to date, and whole."""

import make_reference
from pydantic import BaseModel

from qd2mora.recipe import Recipe


def test_the_reference_is_that_of_the_schema() -> None:
    assert make_reference.PAGE.read_text(encoding="utf-8") == make_reference.reference(), (
        "run python scripts/make_reference.py"
    )


def test_every_key_of_every_section_is_described_with_its_values() -> None:
    page = make_reference.reference()
    sections = dict(make_reference.sections(Recipe))
    assert {"", "adapter.gates.ROLE", "data.tasks[]", "memory.offload"} <= sections.keys()
    for place, model in sections.items():
        part = page.partition(f"\n## {place or 'The whole'}\n")[2].partition("\n## ")[0]
        rows = [line for line in part.splitlines() if line.startswith("| `")]
        assert [row.split("`")[1] for row in rows] == list(model.model_fields)
        assert all(len(row.replace("\\|", "").strip("|").split("|")) == 4 for row in rows)
        assert all(row.replace("\\|", "").split("|")[place].strip() for row in rows for place in (2, 4))


def test_a_key_that_says_nothing_is_a_mistake() -> None:
    class Silent(BaseModel):
        loud: int = 1
        """Says something."""
        quiet: int = 2

    try:
        make_reference.described(Silent)
    except LookupError as error:
        assert str(error) == "Silent says nothing of quiet"
    else:
        raise AssertionError("it was described")
