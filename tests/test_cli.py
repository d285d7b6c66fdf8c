"""The command line: what it promises, and bad input answered with one line, exit code 2, and nothing written."""

import inspect
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import tiny
import typer

from qd2mora.cli import main
from qd2mora.cli.groups import grouped
from qd2mora.recipe import load_recipe
from qd2mora.recipe.shipped import shipped_recipes


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["qd2mora", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def write_recipe(made: Path, folder: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(tiny.recipe_text(made / "base", made / "data", folder / "run"), encoding="utf-8")
    return path


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


BAD = [
    (["adapter.rnak=8"], "did you mean adapter.rank"),
    (["adapter.lora_r=8"], "adapter.rank"),
    (["adapter.rank=eight"], "adapter.rank: 'eight'"),
    (["adapter.rank=0"], "adapter.rank: 0"),
    (["adapter.method=d2mroa"], "did you mean 'd2mora'"),
    (["adapter.targets=[q_prjo]"], "'q_prjo' matches no linear"),
    (["base.model=./nowhere"], "no folder './nowhere'"),
    (["base.model=random:tiny"], "no tokenizer"),
    (["data.tasks.0.path=nothing.jsonl"], "no file 'nothing.jsonl'"),
    (["data.tasks.0.path={here}/empty.jsonl"], "empty"),
    (["data.tasks.0.path={here}/text.jsonl"], "line 2: not JSON"),
    (["data.tasks.0.path={here}/fields.jsonl"], "row 2: no field 'output'"),
    (["data.tasks.0.format=instructions"], "did you mean 'instruction'"),
    (["data.max_length=8"], "every label is masked"),
    (["output={here}/taken"], "not empty"),
    (["output={here}/text.jsonl"], "is a file"),
    (["--resume", "--overwrite"], "not both"),
    (["--resume"], "not a run folder"),
    (["train.trackers=[aim]"], "aim is not installed"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input_is_one_line_and_exit_code_2_and_nothing_written(
    arguments: list[str],
    words: str,
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty.jsonl").write_text("", encoding="utf-8")
    (tmp_path / "text.jsonl").write_text('{"instruction": "x", "output": "y"}\nnot json\n', encoding="utf-8")
    (tmp_path / "fields.jsonl").write_text(
        '{"instruction": "x", "output": "y"}\n{"output": 1}\n'.replace('{"output": 1}', '{"instruction": "x"}'),
        encoding="utf-8",
    )
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine", encoding="utf-8")
    recipe = write_recipe(made, tmp_path)
    before = snapshot(tmp_path)
    code = run(monkeypatch, "train", recipe, *(argument.format(here=tmp_path) for argument in arguments))
    err = capsys.readouterr().err
    assert (code, err.count("\n"), err[:7]) == (2, 1, "error: "), err
    assert words in err
    assert snapshot(tmp_path) == before
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["trian"], 2),
        (["train"], 2),
        (["train", "nowhere.yaml"], 2),
        (["merge", "nowhere", "--out", "x"], 2),
        (["merge", "nowhere"], 2),
        (["verify", "nowhere"], 2),
        (["eval", "nowhere"], 2),
        (["generate", "nowhere", "--prompt", "x"], 2),
        (["recipes", "quickstrat"], 2),
        (["methods", "d2mroa"], 2),
    ],
    ids=lambda value: str(value),
)
def test_other_verbs_refuse_in_one_line(
    arguments: list[str], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *arguments) == code
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1


def test_the_whole_way_from_recipe_to_answers(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(made, tmp_path)
    changes = ["finish.export=true", "finish.score=true", "train.steps=3"]
    assert run(monkeypatch, "train", recipe, *changes) == 0
    out = capsys.readouterr().out
    for words in ("held-out loss", "merged keeps", "exact answers", "fp16 export"):
        assert words in out
    folder = tmp_path / "run"
    scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    assert set(scores) == {"base", "adapter", "fp16 export"}
    assert run(monkeypatch, "merge", folder, "--out", tmp_path / "out", "--strategy", "mean_gate") == 0
    assert run(monkeypatch, "eval", tmp_path / "out", "--recipe", recipe, "--limit", "3", "--json") == 0
    assert run(monkeypatch, "eval", folder, "--limit", "3") == 0
    assert run(monkeypatch, "generate", folder, "--prompt", "Say the first word.", "--max-new-tokens", "4") == 0
    assert run(monkeypatch, "preview", recipe, "-n", "1") == 0
    assert "Say the first word." in capsys.readouterr().out
    for each in (tmp_path / "out", folder):
        assert run(monkeypatch, "verify", each) == 0
        assert capsys.readouterr().out.startswith(f"{each}: whole, ")
    weights = tmp_path / "out" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert run(monkeypatch, "verify", tmp_path / "out") == 6
    assert "model.safetensors is not what was written" in capsys.readouterr().err
    before = snapshot(folder)
    assert run(monkeypatch, "train", recipe, *changes) == 2
    assert "--resume" in capsys.readouterr().err
    assert snapshot(folder) == before
    assert run(monkeypatch, "train", recipe, "train.steps=2", "--overwrite") == 0


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_is_planned(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = shipped_recipes()[name]
    base = [] if name.startswith("quickstart") else ["base.model=random:llama2-7b", "--device", "cuda"]
    assert run(monkeypatch, "plan", path, *base, "--json") == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["fits"] and sum(planned["items"].values()) == planned["peak_bytes"]
    assert {"train.micro_batch", "memory.checkpointing"} <= planned["choices"].keys()
    if name.endswith("8gb"):
        assert planned["peak_bytes"] <= 7 * 2**30 - planned["reserve_bytes"]
        assert run(monkeypatch, "plan", path, *base, "--budget", "1GiB") == 3
        assert "way out" in capsys.readouterr().out
        assert run(monkeypatch, "plan", path, *base, "--budget", "3 apples") == 2


def test_a_plan_reads_the_first_rows_and_tells_of_a_missing_file(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(made, tmp_path)
    assert run(monkeypatch, "plan", recipe) == 0
    out = capsys.readouterr().out
    assert "were read" in out and "tokens on average" in out and "rows are planned as" in out
    assert run(monkeypatch, "plan", recipe, "data.tasks.0.path=gone.jsonl", "--json") == 2
    ended = capsys.readouterr()
    assert "no file 'gone.jsonl'" in ended.err and json.loads(ended.out)["peak_bytes"] > 0


def test_a_run_that_will_not_fit_does_not_start(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "train", write_recipe(made, tmp_path), "memory.budget=1MiB") == 3
    err = capsys.readouterr().err
    assert err.startswith("error: memory: needs") and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_recipes_and_methods_print_what_there_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(monkeypatch, "recipes") == 0
    assert "quickstart" in capsys.readouterr().out
    assert run(monkeypatch, "recipes", "quickstart") == 0
    (tmp_path / "my.yaml").write_text(capsys.readouterr().out, encoding="utf-8")
    copied, shipped = load_recipe(tmp_path / "my.yaml"), load_recipe(shipped_recipes()["quickstart"])
    assert Path(copied.base.model).samefile(shipped.base.model)
    assert copied.fingerprint() == shipped.fingerprint()
    assert run(monkeypatch, "methods") == 0
    assert run(monkeypatch, "methods", "d2mora") == 0
    assert "softmax(R1 x)" in capsys.readouterr().out


@dataclass(frozen=True)
class Size:
    """Two options."""

    wide: Annotated[int, typer.Option(help="How wide.")] = 3
    high: int = 4


def test_a_group_of_options_is_its_fields_in_their_place() -> None:
    taken: list[object] = []

    @grouped
    def verb(name: str, size: Size, loud: bool = False) -> None:
        taken.append((name, size, loud))

    found = inspect.signature(verb).parameters
    assert list(found) == ["name", "wide", "high", "loud"]
    assert [found[name].default for name in ("wide", "high", "loud")] == [3, 4, False]
    assert found["wide"].annotation == inspect.get_annotations(Size)["wide"]
    verb("a", high=7)
    verb("b", 1, 2, loud=True)
    assert taken == [("a", Size(3, 7), False), ("b", Size(1, 2), True)]
    with pytest.raises(TypeError, match="deep"):
        verb("a", deep=1)


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from qd2mora.cli import main; sys.argv = ['qd2mora', '--help']\n"
        "try: main()\nexcept SystemExit: sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
