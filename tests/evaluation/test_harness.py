"""lm-evaluation-harness asks a routed model: its numbers are those of our own passes."""

import json
from pathlib import Path

import pytest

from qd2mora.errors import InputRefused
from qd2mora.evaluation import EvalOptions, Subject

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore")  # the harness's and evaluate's own

TASK = """
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
output_type: {kind}
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_target: {target}
{more}
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    rows = [{"text": "Say the first word: red blue", "label": 0}, {"text": "Say the last word: sun", "label": 1}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tmp_path


def test_choices_and_generation_run_on_a_routed_run(tasks: Path, made: Path, subject: Subject) -> None:
    from test_answering import slow_loss

    from qd2mora.data import Pair, encode
    from qd2mora.evaluation.harness import HarnessModel, run_harness

    more = 'doc_to_choice: ["red", "green"]\nmetric_list: [{metric: acc}]'
    text = TASK.format(path=tasks / "rows.jsonl", kind="multiple_choice", target="label", more=more)
    (tasks / "colours.yaml").write_text(text, encoding="utf-8")
    results = run_harness(made / "run", ["colours"], folder=tasks, how=EvalOptions(out=tasks / "out.json"))
    assert results["colours"]["acc,none"] in (0.0, 0.5, 1.0)
    assert json.loads((tasks / "out.json").read_text(encoding="utf-8")) == results
    row = encode([Pair("red", "blue green")], subject.tokenizer, 0, 64, True)[0]
    ids = row.ids[row.masked :].tolist()
    asked = HarnessModel(subject, 4)
    (value, _), (again, _) = asked._loglikelihood_tokens([(("", ""), row.ids[: row.masked].tolist(), ids)] * 2)
    assert value == again == pytest.approx(-slow_loss(subject, row, ids), rel=2e-5)


def test_tasks_that_are_done_are_not_asked_again(made: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qd2mora.evaluation.harness import HarnessModel, run_harness

    more = 'doc_to_choice: ["red", "green"]\nmetric_list: [{metric: acc}]'
    text = TASK.format(path=tasks / "rows.jsonl", kind="multiple_choice", target="label", more=more)
    for name in ("colours", "shades"):
        (tasks / f"{name}.yaml").write_text(text.replace("colours", name), encoding="utf-8")
    whole = run_harness(made / "run", ["colours", "shades"], folder=tasks)
    weigh, calls = HarnessModel._loglikelihood_tokens, []

    def killed_at_the_second(self: HarnessModel, requests: list, **rest: object) -> list:
        calls.append(len(requests))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return weigh(self, requests, **rest)

    monkeypatch.setattr(HarnessModel, "_loglikelihood_tokens", killed_at_the_second)
    out = tasks / "out.json"
    with pytest.raises(KeyboardInterrupt):
        run_harness(made / "run", ["colours", "shades"], folder=tasks, how=EvalOptions(out=out))
    assert run_harness(made / "run", ["colours", "shades"], folder=tasks, how=EvalOptions(out=out)) == whole
    assert len(calls) == 3
    with pytest.raises(InputRefused, match="limit changed"):
        run_harness(made / "run", ["colours"], folder=tasks, how=EvalOptions(out=out), limit=1)


def test_a_task_that_is_not_known_and_an_adapter_that_reads_more_are_refused(made: Path, tasks: Path) -> None:
    import asking

    from qd2mora.evaluation.harness import run_harness

    with pytest.raises(InputRefused, match="no task 'colors'"):
        run_harness(made / "run", ["colors"])
    asking.save_run(made, "by_task", method="moelora")
    text = TASK.format(path=tasks / "rows.jsonl", kind="generate_until", target="label", more="")
    (tasks / "colours.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(InputRefused, match="reads the task or a vector"):
        run_harness(made / "by_task", ["colours"], folder=tasks)
