"""The page of a run: whole, self-contained, harmless whatever a run holds, and seen by a browser."""

import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import tiny
from rich.console import Console

from qd2mora.cli import main
from qd2mora.cli.training_end import finish
from qd2mora.inspection import inspect_where_due
from qd2mora.recipe import load_recipe
from qd2mora.report import read_run, show_inspection
from qd2mora.report.chart import short
from qd2mora.report.curves import Series, line_chart, smoothed, thinned
from qd2mora.report.page import escape
from qd2mora.report.run_contents import LoggedEvaluation
from qd2mora.report.run_page import run_page
from qd2mora.report.scales import ticks
from qd2mora.training import train

HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=\"alert('2')\">&amp;"
TAGS = {"html", "head", "meta", "title", "style", "body", "header", "main", "nav", "section", "footer", "div", "p"}
TAGS |= {"h1", "h2", "h3", "b", "i", "a", "span", "small", "ul", "li", "dl", "dt", "dd", "pre", "details", "summary"}
TAGS |= {"table", "thead", "tbody", "tr", "th", "td", "svg", "desc", "path", "line", "circle", "rect", "text"}


class Seen(HTMLParser):
    """Collects tags, attributes and text, and checks that what opens is closed."""

    VOID = frozenset({"meta", "line", "path", "rect", "circle"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.text, self.open = "", []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def check_harmless(page: str) -> Seen:
    seen = Seen(page)
    assert not seen.open and seen.tags <= TAGS, seen.tags - TAGS
    for name, value in seen.attributes:
        assert not name.startswith("on") and name not in ("src", "srcset", "action", "formaction")
        assert name != "href" or value.startswith("#")
    assert "url(" not in page and "@import" not in page
    assert "default-src 'none'" in page
    return seen


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose rows are hostile."""
    folder = tmp_path_factory.mktemp("made")
    tiny.save_base(folder / "base")
    tiny.save_tasks(folder / "data")
    rows = [json.loads(line) for line in (folder / "data" / "first.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = [json.dumps(row | {"input": HOSTILE + row["input"], "output": HOSTILE[:20]}) for row in rows]
    (folder / "data" / "first.jsonl").write_text("\n".join(lines), encoding="utf-8")
    path = folder / "recipe.yaml"
    path.write_text(tiny.recipe_text(folder / "base", folder / "data", folder / "run"), encoding="utf-8")
    train(load_recipe(path, ["finish.export=true", "finish.score=true", "train.steps=3", "data.max_length=200"]))
    finish(folder / "run", Console(quiet=True))
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def verb(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["qd2mora", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def test_the_page_of_a_finished_run_holds_everything_and_nothing_hostile_but_as_text(finished: Path) -> None:
    page = (finished / "report.html").read_text(encoding="utf-8")
    seen = check_harmless(page)
    for words in ("training loss", "held-out loss by task", "learning rate", "gradient norm", "planned peak"):
        assert words in seen.text
    for words in ("measured peak", "scores by task", "what the export keeps", "q_proj, router over down experts (A)"):
        assert words in seen.text
    for words in ("entropy by layer", "likeness of experts over time", "likeness by bank", "expert 2"):
        assert words in seen.text
    assert HOSTILE[:20] in seen.text and any(HOSTILE + word in seen.text for word in tiny.WORDS)
    assert "prefers-color-scheme: dark" in page and "@media print" in page


def test_names_in_a_run_from_elsewhere_are_text_too(run: Path) -> None:
    """A recipe refuses such a name; files that somebody else wrote may hold any."""
    for name in ("routing.json", "scores.json", "manifest.json", "samples.json", "export/export_report.json"):
        content = json.loads((run / name).read_text(encoding="utf-8"))
        (run / name).write_text(json.dumps(_renamed(content)), encoding="utf-8")
    seen = check_harmless(run_page(read_run(run)))
    assert seen.text.count(HOSTILE) > 100 and "not as expected" not in seen.text


def _renamed(content: object) -> object:
    """Put a hostile text after every text that is data, and after the keys that are names of tasks and linears."""
    if isinstance(content, dict):
        hostile = {"first", "last", "activations", "memory.checkpointing", "versions.torch"}
        is_name = {key: key in hostile or key.startswith("model.") for key in content}
        return {key + HOSTILE * is_name[key]: _renamed(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_renamed(value) for value in content]
    return content + HOSTILE if isinstance(content, str) and content not in ("down", "up", "cpu") else content


def test_every_picture_has_a_name_and_a_description(finished: Path) -> None:
    page = (finished / "report.html").read_text(encoding="utf-8")
    pictures = page.count('<svg role="img"')
    assert pictures > 10 and page.count('aria-labelledby="t') == pictures == page.count("<desc id=")
    assert page.count("<svg") == pictures + page.count('aria-hidden="true"')


def test_a_page_depends_on_its_run_alone(run: Path) -> None:
    assert run_page(read_run(run)) == run_page(read_run(run))


@pytest.mark.parametrize("name", ["manifest.json", "scores.json", "samples.json", "export/export_report.json"])
@pytest.mark.parametrize("content", ["{", "[1, 2]", '{"plan": 3, "base": {"x": 1}, "modules": [1]}', "[" * 5000])
def test_a_damaged_file_costs_its_own_part_alone(name: str, content: str, run: Path) -> None:
    (run / name).write_text(content, encoding="utf-8")
    seen = check_harmless(run_page(read_run(run)))
    assert "training loss" in seen.text and "entropy by layer" in seen.text


def test_a_run_cut_short_is_shown_as_far_as_it_came(run: Path) -> None:
    for name in ("adapter", "export"):
        shutil.rmtree(run / name)
    for name in ("routing.json", "scores.json", "samples.json"):
        (run / name).unlink()
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    (run / "metrics.jsonl").write_text("\n".join(lines[:2]) + '\n{"step": 2, "lo', encoding="utf-8")
    inspect_where_due(run)
    files = read_run(run)
    assert not files.damaged
    assert "training loss" in check_harmless(run_page(files)).text
    (run / "metrics.jsonl").unlink()
    assert "No step has been logged yet" in check_harmless(run_page(read_run(run))).text


def test_a_collapse_stands_at_the_top(run: Path) -> None:
    content = json.loads((run / "routing.json").read_text(encoding="utf-8"))
    (run / "routing.json").write_text(json.dumps(content | {"alarm": "routing collapsed in 1"}), encoding="utf-8")
    page = run_page(read_run(run))
    assert page.index('role="alert">Routing collapsed in 1') < page.index("<main>")


def test_inspect_prints_a_summary_and_writes_the_page(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "routing.json").unlink()
    assert verb(monkeypatch, "inspect", run, "--html", tmp_path / "page.html", "--rows", 4) == 0
    out = capsys.readouterr().out
    for words in ("routing, means over layers", "least even routers", "likeness of experts", "page.html"):
        assert words in out
    check_harmless((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert json.loads((run / "routing.json").read_text(encoding="utf-8"))["rows"]["last"] == {"held out": 4}
    assert verb(monkeypatch, "inspect", run, "--json", "--again") == 0
    assert json.loads(capsys.readouterr().out)["rows"]["last"] == {"held out": 8}


def test_inspect_draws_a_picture(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("resvg_py")
    assert verb(monkeypatch, "inspect", run, "--png", tmp_path / "run.png") == 0
    content = (tmp_path / "run.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and len(content) > 20_000


def test_inspect_refuses_in_one_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "routing.json").write_text('{"version": 0}', encoding="utf-8")
    for arguments, code in (([tmp_path], 2), ([run], 6), ([run, "--again", "--html", tmp_path / "no" / "x.html"], 2)):
        assert verb(monkeypatch, "inspect", *arguments) == code
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1


def test_escaped_text_is_text_anywhere() -> None:
    assert escape("<a href='x'>&\"\x00\u202e") == "&lt;a href=&#x27;x&#x27;&gt;&amp;&quot;\ufffd\ufffd"


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.2, 17), (1e-5, 2e-5), (5, 5), (0, 0), (-2, -2), (999, 100001)])
def test_ticks_cover_what_is_drawn_in_few_round_steps(low: float, high: float) -> None:
    found = ticks(low, high)
    assert found[0] <= low + 1e-12 and found[-1] >= high - 1e-12 and 2 <= len(found) <= 8
    assert all(len(short(tick)) <= 7 for tick in found)


def test_long_curves_are_thinned_to_means_and_a_running_mean_has_no_lag_at_the_start() -> None:
    points = [(float(step), float(step % 2)) for step in range(10_000)]
    found = thinned(points, 100)
    assert len(found) == 100 and all(y == 0.5 for _, y in found) and found[-1][0] == 9999
    assert smoothed(points)[0] == points[0] and smoothed(points)[5000][1] == pytest.approx(0.5, abs=0.01)
    assert "no numbers" in line_chart("empty", []).html()


def test_a_browser_shows_the_page_without_a_complaint(finished: Path, tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium here")
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--enable-logging=stderr", "--window-size=400,900", f"--screenshot={tmp_path / 'page.png'}"]
    shown = subprocess.run(
        [*command, "--dump-dom", (finished / "report.html").as_uri()], capture_output=True, timeout=120, text=True
    )
    assert "CONSOLE" not in shown.stderr
    assert "what the export keeps" in shown.stdout and "alert(1)" in Seen(shown.stdout).text
    assert (tmp_path / "page.png").stat().st_size > 10_000


def test_an_axis_of_logarithms_says_so_and_others_do_not() -> None:
    for points, is_said in (([(0.0, 1.0), (1.0, 100.0)], True), ([(0.0, 1.0), (1.0, 2.0)], False)):
        chart = line_chart("loss", [Series("loss", points)], is_log=True)
        assert ("logarithmic axis" in chart.drawing, "logarithmic axis" in chart.about) == (is_said, is_said)


def test_a_page_tells_how_long_the_steps_took_and_that_experts_are_alike(run: Path, tmp_path: Path) -> None:
    contents = read_run(run)
    assert contents.routing is not None and contents.training_s is not None
    logged = [replace(line, tokens=300, tokens_per_s=0.1) for line in contents.steps]
    summary = contents.routing.summary | {"entropy": 0.97, "cos_up": 0.1, "cos_down": 0.1}
    contents = replace(contents, steps=logged, routing=replace(contents.routing, summary=summary))
    hours = logged[-1].step * 3000 // 3600
    text = check_harmless(run_page(contents)).text
    assert f"{hours}:" in text.partition("time of the steps")[2][:40]
    assert "Routers are near uniform (mean gate entropy 97.0%" in text and "one LoRA" in text
    output = io.StringIO()
    show_inspection(contents, tmp_path / "page.html", Console(file=output, width=200))
    assert "note: routers are near uniform" in output.getvalue() and f" steps in {hours}:" in output.getvalue()
    other = replace(contents, routing=replace(contents.routing, summary=summary | {"entropy": 0.5}))
    assert "one LoRA" not in check_harmless(run_page(other)).text


def test_what_an_objective_measures_is_told_by_task() -> None:
    line = LoggedEvaluation(3, {"a": 0.5}, {"a": {"accuracy": 0.9, "margin": 1.5}, "b": {"accuracy": 0.8}})
    assert line.measured("accuracy") == {"a": 0.9, "b": 0.8} and line.measured("margin") == {"a": 1.5}
