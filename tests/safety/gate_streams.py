"""ST1: closed, full and broken standard streams, and streams that speak ASCII alone, with every verb."""

import shutil
from pathlib import Path

from forked import Result
from printed import CONDITIONS, Printed, run_on

from qd2mora.safekeeping.verification import verified

PRINTS = "exit 5 where nothing that was to be printed arrives"
LEAVES = "its result lies on disk"
REFUSED = "exit 2"


def verbs(made: Path, folder: Path) -> dict[str, tuple[str, list[object]]]:
    """Return every verb with arguments, and what becomes of it where standard output is full."""
    run, recipe, lora = made / "run", made / "recipe.yaml", folder / "lora"
    return {
        "bare": (PRINTS, []),
        "--help": (PRINTS, ["--help"]),
        "--version": (PRINTS, ["--version"]),
        "train": (LEAVES, ["train", recipe, f"output={folder / 'run'}", "--overwrite", "train.steps=2"]),
        "plan": (PRINTS, ["plan", recipe]),
        "plan --json": (PRINTS, ["plan", recipe, "--json"]),
        "preview": (PRINTS, ["preview", recipe]),
        "merge": (LEAVES, ["merge", run, "--out", folder / "merged"]),
        "eval": (PRINTS, ["eval", run, "--limit", "2"]),
        "eval --out": (LEAVES, ["eval", run, "--limit", "2", "--out", folder / "scores.json"]),
        "verify": (PRINTS, ["verify", run]),
        "generate": (PRINTS, ["generate", run, "--prompt", "Say", "--max-new-tokens", "3"]),
        "chat": (PRINTS, ["chat", run, "--max-new-tokens", "3"]),
        "compose": (LEAVES, ["compose", "linear", lora, lora, "--out", folder / "composed"]),
        "inspect": (LEAVES, ["inspect", run, "--html", folder / "page.html"]),
        "inspect --json": (PRINTS, ["inspect", run, "--json"]),
        "methods": (PRINTS, ["methods"]),
        "methods NAME": (PRINTS, ["methods", "d2mora"]),
        "recipes": (PRINTS, ["recipes"]),
        "recipes NAME": (PRINTS, ["recipes", "quickstart"]),
        "suggest-experts": (PRINTS, ["suggest-experts", recipe]),
        "no such verb": (REFUSED, ["trian"]),
        "no such run": (REFUSED, ["generate", folder / "nowhere", "--prompt", "x"]),
        "no such key": (REFUSED, ["plan", recipe, "train.setps=1"]),
    }


def gate(made: Path, folder: Path, quick: bool) -> Result:
    """Run every verb on streams of every condition; `quick`: those but training on two pairs, in ASCII alone."""
    result = Result("ST1")
    lora = ["train", made / "recipe.yaml", "adapter.method=lora", "train.steps=1", f"output={folder / 'lora'}"]
    result.check(run_on(*lora).code == 0, "no LoRA to compose")
    pairs = [(out, err) for out in CONDITIONS for err in CONDITIONS]
    few = [("full", "kept"), ("kept", "closed"), ("closed", "broken"), ("broken", "full")]
    for name, (kind, arguments) in verbs(made, folder).items():
        for encoding in ("ascii",) if quick else ("ascii", "utf-8"):
            for out, err in (few if name == "train" else few[:2]) if quick else pairs:
                printed = _run(arguments, folder, out, err, encoding)
                case = f"{name} in {encoding} with out {out}, err {err}: {printed}"
                holds = _is_right(kind, out, err, printed) and _is_whole(name, folder)
                result.check(holds and (encoding != "ascii" or (printed.out + printed.err).isascii()), case)
    return result


def _is_right(kind: str, out: str, err: str, printed: Printed) -> bool:
    wanted = 2 if kind == REFUSED else 5 if (kind, out) == (PRINTS, "full") else 0
    if printed.code != wanted or "Traceback" in printed.err + printed.out:
        return False
    if kind == REFUSED:
        return err != "kept" or (printed.err.startswith("error: ") and printed.err.count("\n") == 1)
    if out == "kept":
        return bool(printed.out)
    return out != "full" or err != "kept" or printed.err.count("standard output: No space left") == 1


def _run(arguments: list[object], folder: Path, out: str, err: str, encoding: str) -> Printed:
    for name in ("merged", "composed", "scores.json"):
        target = folder / name
        if target.is_dir():
            shutil.rmtree(target)
        target.unlink(missing_ok=True)
    return run_on(*arguments, out=out, err=err, given=b"Say the first word.\n", encoding=encoding)


def _is_whole(name: str, folder: Path) -> bool:
    """Return whether a verb that leaves a folder has left a whole one."""
    place = {"train": folder / "run", "merge": folder / "merged", "compose": folder / "composed"}.get(name)
    if place is None:
        return True
    found = list(verified(place))
    return bool(found) and all(each.num_bytes > 0 for each in found)


__all__ = ["gate"]
