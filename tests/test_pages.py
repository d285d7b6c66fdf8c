"""What the README and the pages of docs/ point at is there: links, scripts, results, recipes and verbs."""

import re
from pathlib import Path

import pytest

from qd2mora.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_points_at_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []
    named = re.findall(r"\b(?:scripts|recipes|tests)/[\w./-]+\.(?:py|sh|json|yaml|png)\b", text)
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_verb_that_a_page_types_is_one() -> None:
    verbs = {command.name or command.callback.__name__.replace("_", "-") for command in app.registered_commands}
    verbs |= {group.name for group in app.registered_groups}
    typed = {
        (page.name, verb)
        for page in PAGES
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
        for verb in re.findall(r"(?m)(?:^|&& |/)qd2mora ([a-z][a-z-]+)", block)
    }
    assert {verb for _, verb in typed} >= {"train", "merge", "plan"}
    assert sorted(found for found in typed if found[1] not in verbs) == []
