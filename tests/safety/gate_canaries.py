"""X1: secrets come in by every way there is, and no byte of them is found in what a command leaves or prints."""

import os
import shutil
from pathlib import Path

import tiny
from forked import Result, command, run

from qd2mora.errors import InputRefused

HEX = "0123456789abcdef" * 3
CANARIES = {
    "a Hugging Face token": "hf_CanaryCanaryCanaryCanaryCanary01",
    "an organisation's token": "api_org_CanaryCanaryCanaryCanary02",
    "a wandb key": HEX[:40],
    "a new wandb key": "wandb_v1_CanaryCanaryCanaryCanary04",
    "an OpenAI key": "sk-proj-CanaryCanaryCanaryCanary05",
    "an Anthropic key": "sk-ant-api03-CanaryCanaryCanary-06",
    "a GitHub token": "ghp_CanaryCanaryCanaryCanaryCanary07",
    "a fine GitHub token": "github_pat_CanaryCanaryCanaryCanary08",
    "a GitLab token": "glpat-CanaryCanaryCanary09",
    "an AWS key": "AKIACANARYCANARY10AB",
    "a Google key": "AIzaCanaryCanaryCanaryCanaryCanaryCan11",
    "a Slack token": "xoxb-canary-canary-canary-12",
    "a web token": "eyJhbGciOiJDYW5hcnki.eyJzdWIiOiJjYW5hcnkxMyJ9.Canary13Canary",
    "a bearer token": "Bearer CanaryCanaryCanary14",
    "a URL with a user": "https://canary:canary15@host/model",
    "a private key": "-----BEGIN PRIVATE KEY-----Canary16Canary-----END PRIVATE KEY-----",
}
# Without a shape: known by the name of the variable.
VARIABLES = {
    "HF_TOKEN": "canary-env-17-value",
    "WANDB_API_KEY": "canary-env-18-value",
    "MLFLOW_TRACKING_PASSWORD": "canary-env-19-value",
    "AWS_SECRET_ACCESS_KEY": "canary/env/20/value",
}

KILLS = {f"a kill after {seconds} s": seconds for seconds in (0.2, 0.5, 1.0, 2.0)}


def make_run(folder: Path) -> Path:
    """Train a tiny run to its end; return the folder that holds base, data and run."""
    tiny.save_base(folder / "base")
    tiny.save_tasks(folder / "data")
    recipe = folder / "recipe.yaml"
    recipe.write_text(tiny.recipe_text(folder / "base", folder / "data", folder / "run"), encoding="utf-8")
    outcome = run(command("train", recipe, "train.steps=1"), limit_s=120)
    assert outcome.code == 0, outcome
    return folder


def gate(made: Path, folder: Path, step: int = 1) -> Result:
    """Bring every `step`-th canary in by recipe, override, row, config and argument; all of the environment at once."""
    result = Result("X1")
    for name, secret in list(CANARIES.items())[::step]:
        core = secret.split("@")[0].removeprefix("https://")
        result.check(core not in str(InputRefused(f"{secret} will not do")), f"{name} in an error of the library")
        for way in ("value", "key", "override", "override without =", "row", "config", "argument", "debug"):
            work = folder / "work"
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            recipe, arguments = _brought_in(way, secret, made, work)
            planted = set(work.rglob("*"))
            outcome = run(command("train", recipe, *arguments), limit_s=60)
            left = [path for path in work.rglob("*") if path.is_file() and path not in planted]
            text = (outcome.out + outcome.err).encode() + b"".join(path.read_bytes() for path in left)
            refused = outcome.code == 2 if way != "debug" else outcome.code == 1 and "Traceback" in outcome.err
            result.check(refused and core.encode() not in text, f"{name} as {way}: {outcome}")
    for way in ("a run that ends", "a crash", *KILLS):
        _environment(result, way, made, folder)
    return result


def _brought_in(way: str, secret: str, made: Path, work: Path) -> tuple[Path, list[str]]:
    """Plant the secret; return the recipe and the arguments."""
    quoted = "'" + secret.replace("'", "''") + "'"
    text = tiny.recipe_text(made / "base", made / "data", work / "run")
    arguments: list[str] = []
    if way in ("value", "debug"):
        text = text.replace("rank: 4", f"rank: {quoted}")
        arguments = ["--debug"] if way == "debug" else []
    elif way == "key":
        text = text.replace("rank: 4", f"? {quoted}\n : 4")
    elif way == "override":
        arguments = [f"base.model.token={secret}"]
    elif way == "override without =":
        arguments = [secret.replace("=", "")]
    elif way == "row":
        (work / "rows.jsonl").write_text(f'{{"instruction": "x", "{secret}": 1}}\n', encoding="utf-8")
        arguments = [f"data.tasks.0.path={work / 'rows.jsonl'}"]
    elif way == "config":
        shutil.copytree(made / "base", work / "base")
        config = work / "base" / "tokenizer_config.json"
        config.write_text(config.read_text(encoding="utf-8").replace("{", f'{{"x": "{secret}",', 1), encoding="utf-8")
        arguments = [f"base.model={work / 'base'}"]
    else:
        arguments = [f"--hub-token={secret}"]
    recipe = work / "recipe.yaml"
    recipe.write_text(text, encoding="utf-8")
    return recipe, arguments


def _environment(result: Result, way: str, made: Path, folder: Path) -> None:
    """Secrets of the environment stay out of a run that ends, one that crashes with them in the text, and a kill."""
    work = folder / f"environment of {way}"
    work.mkdir()
    recipe = work / "recipe.yaml"
    recipe.write_text(tiny.recipe_text(made / "base", made / "data", work / "run"), encoding="utf-8")

    def action() -> None:
        os.environ.update(VARIABLES)
        if way == "a crash":
            from qd2mora.disk.durable import write_json

            (work / "run").mkdir()
            write_json(work / "run" / "manifest.json", {"environment": VARIABLES})
            try:
                command("recipes", "nothing", "--debug")()
            finally:
                raise RuntimeError(f"request failed with {VARIABLES}")
        command("train", recipe, "train.steps=2")()

    outcome = run(action, limit_s=KILLS.get(way, 120))
    left = b"".join(path.read_bytes() for path in work.rglob("*") if path.is_file())
    found = [name for name, value in VARIABLES.items() if value.encode() in left + (outcome.out + outcome.err).encode()]
    wanted = {"a run that ends": 0, "a crash": 1}.get(way)
    ended = outcome.code == wanted or (way in KILLS and outcome.code == 0)
    result.check(ended and not found, f"{way}: {found} {outcome}")
