"""Pushing: every hash compared, files put together under the base's public name, searched for secrets, uploaded.

Of a run the adapter and the tokenizer go, of an export all of it; never the recipe, whose paths are this machine's, nor
anything of the data. `--dry-run` leaves in a folder what would have gone.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from qd2mora.disk.file_hash import size_and_hash
from qd2mora.disk.sealed import MANIFEST, read_manifest, seal_whole_folder
from qd2mora.disk.staged import staged_folder
from qd2mora.disk.untrusted import TOKENIZER_NAMES
from qd2mora.errors import InputRefused
from qd2mora.publishing.card import CardFacts, card
from qd2mora.recipe import Base, Recipe
from qd2mora.redact import secret_in
from qd2mora.run_folder import RunFolder, is_run, read_recipe
from qd2mora.safekeeping.inventory import HEAD
from qd2mora.safekeeping.places import taken
from qd2mora.safekeeping.verification import verified

CARD = "README.md"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_TEXTS = (".json", ".md", ".py", ".yaml", ".txt", ".jinja", "Modelfile")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt")
"""Words of a language look like anything."""


@dataclass(frozen=True)
class PushOptions:
    """`base`: the base's name on the hub, where the run's is a folder; `run`: whose report an export's card tells."""

    base: str | None = None
    licence: str | None = None
    run: Path | None = None
    private: bool = False
    dry_run: bool = False
    out: Path | None = None
    """Where a dry run leaves its folder: beside the source, with `-push`, where None."""


@dataclass(frozen=True)
class Pushed:
    """Where it went, and what."""

    where: str
    files: list[str]
    num_bytes: int


@dataclass(frozen=True)
class _Source:
    """What goes: files by the name they get, of which kind, on which base."""

    kind: str
    files: dict[str, Path]
    base: Base
    run: RunFolder | None
    report: dict[str, Any] | None = None


def push(source: Path, name: str, options: PushOptions, say: Callable[[str], object]) -> Pushed:
    """Push a run or an export as OWNER/NAME. Raises InputRefused, DamagedFile, before anything leaves."""
    if not _NAME.fullmatch(name) or "--" in name or ".." in name:
        raise InputRefused(f"'{name}' will not do: OWNER/NAME, of letters, digits, '-', '_' and '.'")
    found = _found(source, options)
    base = _base_name(found.base, options.base)
    for each in verified(source):
        say(f"{each.folder}: whole, {each.num_bytes:,} bytes")
    out = options.out or source.resolve().with_name(f"{source.resolve().name}-push")
    with taken(out, "--out") as target:
        if options.dry_run:
            with staged_folder(target) as stage:
                pushed = _put_together(found, base, name, options, stage)
            return Pushed(str(out), pushed.files, pushed.num_bytes)
        with _Passing(target) as stage:
            pushed = _put_together(found, base, name, options, stage)
            return Pushed(_upload(stage, name, options.private), pushed.files, pushed.num_bytes)


class _Passing:
    """A folder that is gone afterwards."""

    def __init__(self, target: Path) -> None:
        self.path = target

    def __enter__(self) -> Path:
        self.path.mkdir()
        return self.path

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.path)


def _found(source: Path, options: PushOptions) -> _Source:
    if is_run(source):
        opened = RunFolder(source)
        names = sorted(path.name for path in source.iterdir() if path.name in TOKENIZER_NAMES and path.is_file())
        files = {each: source / each for each in names}
        for each in ("adapter_config.json", "adapter_model.safetensors"):
            if not (opened.adapter / each).is_file():
                raise InputRefused(f"'{source}' holds no finished adapter; train it to its end first")
            files[each] = opened.adapter / each
        if (opened.adapter / HEAD).is_file():
            files[HEAD] = opened.adapter / HEAD
        return _Source("adapter", files, read_recipe(source).base, opened)
    manifest = read_manifest(source) if source.is_dir() else None
    report = _json(source / "export_report.json")
    if manifest is None or report is None or "base" not in manifest:
        raise InputRefused(f"'{source}' is neither a run nor an export of one; `qd2mora merge RUN --out DIR` makes one")
    if any(path.is_dir() for path in source.iterdir()):
        raise InputRefused(f"'{source}' holds folders; push one of the exports in it")
    files = {path.name: path for path in sorted(source.iterdir()) if path.name not in (MANIFEST, CARD)}
    parent = options.run or (source.resolve().parent if is_run(source.resolve().parent) else None)
    run = None if parent is None else RunFolder(parent)
    return _Source(str(report["to"]), files, Base(**manifest["base"]), run, report)


def _base_name(base: Base, given: str | None) -> str:
    """Return the base's name on the hub. Raises InputRefused where only its folder is known."""
    name = given or base.model
    if not _NAME.fullmatch(name) or (given is None and Path(name).exists()):
        raise InputRefused(
            f"--base: the base is '{base.model}' here, which says nothing to others; give its name on the hub, "
            "OWNER/NAME"
        )
    return name


def _put_together(found: _Source, base: str, name: str, options: PushOptions, stage: Path) -> Pushed:
    """Fill a folder with what goes. Raises InputRefused where a secret would go along."""
    for target, path in found.files.items():
        _copy(path, stage / target, found.base.model, base, is_kept=options.dry_run)
    recipe: Recipe | None = None
    if found.run is not None:
        recipe = read_recipe(found.run.path)
    scores = None if found.run is None else _json(found.run.scores)
    licence = options.licence or _licence_of(found.base)
    facts = CardFacts(name, found.kind, base, licence, recipe, scores, found.report)
    (stage / CARD).write_text(card(facts), encoding="utf-8")
    known = {path.name: size_and_hash(path) for path in stage.iterdir() if path.name != CARD}
    public = found.base.model_copy(update={"model": base, "cache": "none"})
    seal_whole_folder(stage, known, {"kind": "export", "base": public.model_dump()})
    # Last, over what really goes: texts were rewritten by now, and the card is one of them.
    for path in sorted(stage.iterdir()):
        _refuse_secret(path, found.base.model, base)
    files = sorted(path.name for path in stage.iterdir())
    return Pushed("", files, sum((stage / each).stat().st_size for each in files))


def _copy(source: Path, target: Path, local: str, public: str, *, is_kept: bool) -> None:
    """Copy a file; in texts the base has its public name. Large ones are only linked where the copy passes."""
    if source.name.endswith(_TEXTS) and source.name not in _VOCABULARIES:
        text = source.read_text(encoding="utf-8")
        target.write_text(text.replace(json.dumps(local)[1:-1], public).replace(local, public), encoding="utf-8")
        return
    if not is_kept:
        try:
            os.link(source, target)
            return
        except OSError:  # another file system, or one without links
            pass
    shutil.copyfile(source, target)


def _refuse_secret(path: Path, local: str, public: str) -> None:
    if not path.name.endswith(_TEXTS) or path.name in _VOCABULARIES:
        return
    kind = secret_in(path.read_text(encoding="utf-8"))
    if kind is not None:
        raise InputRefused(f"{path.name} holds {kind}; nothing was pushed. Take it out, and make the export anew")
    home = str(Path.home())
    if len(home) > 5 and home in path.read_text(encoding="utf-8"):
        raise InputRefused(f"{path.name} holds a path of this machine, below {home}; nothing was pushed")


def _licence_of(base: Base) -> str | None:
    """Return the licence that a base's own card beside it names."""
    path = Path(base.model) / CARD
    if not path.is_file():
        return None
    front = re.match(r"---\n(.*?)\n---", path.read_text(encoding="utf-8", errors="replace")[:65536], re.DOTALL)
    found = re.search(r"^license:\s*([\w.-]{1,60})\s*$", front[1], re.MULTILINE) if front else None
    return found[1] if found else None


def _upload(stage: Path, name: str, private: bool) -> str:
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=stage, commit_message="Made by qd2mora")
    except (HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError, RuntimeError) as error:
        words = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputRefused(f"'{name}' was not pushed: {words}; HF_TOKEN or `hf auth login` says who pushes") from error
    return f"https://huggingface.co/{name}"


def _json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


__all__ = ["PushOptions", "Pushed", "push"]
