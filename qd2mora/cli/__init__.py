"""The command line: one verb, one function; heavy imports stay inside the verb, so that --help is instant."""

import errno
import logging
import os
import sys
import traceback
from types import TracebackType

import typer
from typer.exceptions import TyperException

# Each module adds its verbs to the app, in the order of --help.
from qd2mora.cli import (  # isort: skip  # noqa: F401
    run_verbs,
    model_verbs,
    eval_verb,
    talk_verbs,
    reward_verb,
    serve_verb,
    push_verb,
    compose_verb,
    select_verb,
    histories_verb,
    compare_verbs,
    inspect_verbs,
    bench_verb,
    list_verbs,
    doctor_verb,
)
from qd2mora.cli.app import app
from qd2mora.errors import DiskTrouble, InputRefused, SignalStop, StopError
from qd2mora.redact import redacted
from qd2mora.stopping import AGAIN, listening
from qd2mora.terminal import lost_output, open_terminal

LEAVES_FILES = ("train", "merge", "compare", "compose", "select", "histories")
"""Verbs whose result lies on disk; others do with --out, and inspect without --json."""


def main() -> None:
    """Run the command line; an error becomes one line and an exit code."""
    open_terminal()
    sys.excepthook = _show_traceback
    _show_log()
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        # Not app(...): that puts typer's own hook for tracebacks in place of ours.
        with listening(_then(arguments)):
            code = typer.main.get_command(app)(arguments or ["--help"], standalone_mode=False)
    except (StopError, TyperException, OSError) as error:
        if len(arguments) < len(sys.argv[1:]):
            raise
        # Typer's own errors name the option only here.
        words = error.format_message() if isinstance(error, TyperException) else str(error)
        line = " ".join(words.split())
        # A stop that was asked for is no error: what was done is kept.
        kind = "" if isinstance(error, SignalStop) else "error: "
        print(f"{kind}{_process()}{redacted(line)}", file=sys.stderr)
        sys.exit(_exit_code(error))
    except typer.Abort:
        sys.exit(130)
    sys.exit(_told(code if isinstance(code, int) else 0, arguments))


def _then(arguments: list[str]) -> str:
    """Say how a verb that was stopped is gone on with."""
    verb = next((argument for argument in arguments if not argument.startswith("-")), "")
    keeps_answers = verb in ("eval", "generate") and any(
        argument.partition("=")[0] == "--out" for argument in arguments
    )
    if verb == "compare" or keeps_answers:
        return "what is done is kept, and the same command goes on from there"
    if verb in ("merge", "compose", "select", "histories"):
        return "no half of the output is left, run the command again"
    if verb == "eval":
        return "with --out FILE an evaluation goes on where it stopped, without one it begins again"
    return AGAIN


def _told(code: int, arguments: list[str]) -> int:
    """Tell of output that was lost; where it was the result itself, as of `plan > FILE`, the command has failed."""
    trouble = lost_output()
    if trouble is None:
        return code
    verb = next((argument for argument in arguments if not argument.startswith("-")), "")
    asked = {argument.partition("=")[0] for argument in arguments}
    if verb in LEAVES_FILES or "--out" in asked or (verb == "inspect" and "--json" not in asked):
        print(f"warning: standard output: {trouble}; what was printed is lost, the result is whole", file=sys.stderr)
        return code
    print(f"error: standard output: {trouble}; what was printed is lost, run the command again", file=sys.stderr)
    return code or DiskTrouble.exit_code


def _process() -> str:
    """Say which of several processes speaks, the first one apart."""
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"process {rank}: "


def _exit_code(error: StopError | TyperException | OSError) -> int:
    """A full or failing disk is told apart from a path that will not do."""
    if isinstance(error, OSError):
        disk = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
        return DiskTrouble.exit_code if error.errno in disk else InputRefused.exit_code
    return error.exit_code


class _Line(logging.Formatter):
    """A log line without the secrets in it."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


def _show_log() -> None:
    """Print what the package logs, to stderr and once."""
    log, handler = logging.getLogger("qd2mora"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Line("%(message)s"))
    log.handlers, log.propagate = [handler], False
    # On a CPU bitsandbytes 0.50 asks for a package of kernels whose product is not used here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def _show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print the traceback of --debug, or of a mistake of ours, without the secrets in it."""
    print(redacted("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


__all__ = ["app", "main"]
