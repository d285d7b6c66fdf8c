"""What a power cut may leave of a series of system calls: recorded at `os`, replayed on a model of a disk.

The model promises what POSIX does and no more: the content of a file is safe once the file was synced, a name once its
folder was; a rename is atomic. Everything else may be lost, torn, zero or out of order. Files that a library wrote
without `os` are seen when they, or the folder that names them, are synced.
"""

import contextlib
import itertools
import math
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TEARS = int(os.environ.get("GATE_TEARS", "2"))
"""A torn write ends at the first, second, ... of so many parts."""
Call = tuple[str, str, Any]
"""What was called, on which path below the root, and with what."""


@dataclass
class File:
    """Bytes as a reader sees them, and as they are on the platter."""

    live: bytes = b""
    synced: bytes = b""
    is_dirty: bool = False

    def variants(self) -> list[bytes]:
        if not self.is_dirty:
            return [self.synced]
        size, torn = len(self.live), [bytes(len(self.live))]
        for place in [size * number // TEARS for number in range(1, TEARS)]:
            head, tail = self.live[:place], self.live[place:]
            torn += [head, bytes(place) + tail, head + bytes(size - place)]
        return list(dict.fromkeys([self.synced, self.live, *torn]))


@dataclass
class Folder:
    """Names as a reader sees them, as they are on the platter, and the changes between: name to node or None."""

    live: dict[str, "File | Folder"] = field(default_factory=dict)
    synced: dict[str, "File | Folder"] = field(default_factory=dict)
    pending: list[dict[str, "File | Folder | None"]] = field(default_factory=list)

    def change(self, changes: dict[str, "File | Folder | None"]) -> None:
        self.pending.append(changes)
        self.live = _changed(self.live, [changes])

    def variants(self) -> list[dict[str, "File | Folder"]]:
        subsets = itertools.product((False, True), repeat=len(self.pending))
        return [_changed(self.synced, list(itertools.compress(self.pending, subset))) for subset in subsets]


def _changed(
    names: dict[str, "File | Folder"], changes: list[dict[str, "File | Folder | None"]]
) -> dict[str, "File | Folder"]:
    merged: dict[str, Any] = dict(names)
    for change in changes:
        merged |= change
    return {name: node for name, node in merged.items() if node is not None}


def read_tree(path: Path) -> Folder:
    """Return a folder on disk as a tree in which everything is synced."""
    names: dict[str, File | Folder] = {}
    for entry in path.iterdir():
        content = b"" if entry.is_dir() else entry.read_bytes()
        names[entry.name] = read_tree(entry) if entry.is_dir() else File(content, content)
    return Folder(dict(names), dict(names))


class Disk:
    """A tree to which calls are applied one after the other."""

    def __init__(self, root: Folder) -> None:
        self.root = root

    def apply(self, call: Call) -> None:
        kind, path, extra = call
        parent, name = self._parent(path)
        if kind == "mkdir":
            parent.change({name: Folder()})
        elif kind == "create":
            node = parent.live.get(name)
            if isinstance(node, File):
                node.live, node.is_dirty = b"", True
            else:
                parent.change({name: File()})
        elif kind == "write":
            node = parent.live[name]
            assert isinstance(node, File)
            node.live, node.is_dirty = node.live + extra, True
        elif kind == "rename":
            other = extra.rpartition("/")
            assert other[0] == path.rpartition("/")[0], "a rename stays in its folder"
            parent.change({name: None, other[2]: parent.live[name]})
        elif kind == "remove":
            parent.change({name: None})
        else:
            assert kind == "fsync"
            node = self._node(path)
            node.synced = dict(node.live) if isinstance(node, Folder) else node.live  # type: ignore[assignment]
            if isinstance(node, Folder):
                node.pending = []
            else:
                node.is_dirty = False

    def crashes(self, most: int, draw: random.Random) -> Iterator[dict[str, bytes | None]]:
        """Yield what a cut at this moment may leave: path to content, None for a folder; at most so many states."""
        variants = {id(node): node.variants() for node in _nodes(self.root, {}).values()}
        loose = {node: states for node, states in variants.items() if len(states) > 1}
        choices: Iterator[tuple[Any, ...]] = itertools.product(*loose.values())
        if math.prod(map(len, loose.values())) > most:
            choices = (tuple(draw.choice(states) for states in loose.values()) for _ in range(most))
        for choice in choices:
            chosen = dict(zip(loose, choice, strict=True))
            yield dict(_flat(self.root, chosen, ""))

    def _node(self, path: str) -> File | Folder:
        node: File | Folder = self.root
        for part in filter(None, path.split("/")):
            assert isinstance(node, Folder)
            node = node.live[part]
        return node

    def _parent(self, path: str) -> tuple[Folder, str]:
        above, _, name = path.rpartition("/")
        parent = self._node(above)
        assert isinstance(parent, Folder)
        return parent, name


def _nodes(node: File | Folder, seen: dict[int, File | Folder]) -> dict[int, File | Folder]:
    """Return every node that any state may hold."""
    seen[id(node)] = node
    if isinstance(node, Folder):
        every = [*node.live.values(), *node.synced.values(), *(new for each in node.pending for new in each.values())]
        for child in every:
            if child is not None and id(child) not in seen:
                _nodes(child, seen)
    return seen


def _flat(folder: Folder, chosen: dict[int, Any], above: str) -> Iterator[tuple[str, bytes | None]]:
    for name, node in chosen.get(id(folder), folder.synced).items():
        path = f"{above}{name}"
        if isinstance(node, Folder):
            yield path, None
            yield from _flat(node, chosen, f"{path}/")
        else:
            yield path, chosen.get(id(node), node.synced)


def put(state: dict[str, bytes | None], folder: Path) -> None:
    """Write a state out."""
    folder.mkdir()
    for path, content in state.items():
        if content is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(content)


@contextlib.contextmanager
def recorded(root: Path) -> Iterator[list[Call]]:  # noqa: C901 - one small function a call
    """Note every call of `os` that changes something below `root`."""
    calls: list[Call] = []
    real = {name: getattr(os, name) for name in ("open", "write", "fsync", "rename", "replace", "mkdir")}
    real |= {name: getattr(os, name) for name in ("unlink", "remove", "rmdir")}
    known: set[str] = {path.relative_to(root).as_posix() for path in root.rglob("*")}

    def below(path: Any, dir_fd: int | None = None) -> str | None:
        text = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else os.fspath(path)
        if dir_fd is not None:
            text = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), text)
        text = os.path.abspath(text)
        return os.path.relpath(text, root).replace(".", "", text == str(root)) if text.startswith(str(root)) else None

    def note(kind: str, path: str | None, extra: Any = None) -> None:
        if path is not None:
            calls.append((kind, path, extra))
            known.add(path)

    def adopt(path: str) -> None:
        """Take in what a library wrote."""
        entry = root / path
        if entry.is_dir():
            for child in sorted(entry.iterdir()):
                name = child.relative_to(root).as_posix()
                if name not in known and child.is_file():
                    adopt(name)
        elif path not in known:
            note("create", path)
            note("write", path, entry.read_bytes())

    def opened(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        handle: int = real["open"](path, flags, mode, dir_fd=dir_fd)
        if flags & os.O_CREAT:
            note("create", below(path, dir_fd))
        return handle

    def wrote(handle: int, content: Any) -> int:
        size: int = real["write"](handle, content)
        with contextlib.suppress(OSError):
            note("write", below(handle), bytes(memoryview(content)[:size]))
        return size

    def synced(handle: int) -> None:
        real["fsync"](handle)
        path = below(handle)
        if path is not None:
            adopt(path)
            note("fsync", path)

    def renamed(old: Any, new: Any, **options: Any) -> None:
        real["rename"](old, new, **options)
        note("rename", below(old), below(new))
        forgotten = [name for name in known if name == below(old) or name.startswith(f"{below(old)}/")]
        known.difference_update(forgotten)
        known.update(f"{below(new)}{name.removeprefix(str(below(old)))}" for name in forgotten)

    def made(path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        real["mkdir"](path, mode, dir_fd=dir_fd)
        note("mkdir", below(path, dir_fd))

    def gone(name: str) -> Callable[..., None]:
        def remove(path: Any, *, dir_fd: int | None = None) -> None:
            real[name](path, dir_fd=dir_fd)
            place = below(path, dir_fd)
            if place in known:
                note("remove", place)
                known.discard(place)

        return remove

    patches: dict[str, Any] = {"open": opened, "write": wrote, "fsync": synced, "rename": renamed, "replace": renamed}
    patches |= {"mkdir": made, "unlink": gone("unlink"), "remove": gone("remove"), "rmdir": gone("rmdir")}
    try:
        for name, patch in patches.items():
            setattr(os, name, patch)
        yield calls
    finally:
        for name, function in real.items():
            setattr(os, name, function)
