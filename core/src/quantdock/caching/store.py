"""Entries on disk: a folder each, named after its key, whole or absent.

An entry is a folder of safetensors files and a ``manifest.json``. It is written under another name and renamed, so
whoever finds it finds all of it; of two processes that make the same entry, the first to rename wins. Removing goes the
other way: renamed first, deleted then. Whoever has mapped an entry keeps it, as Unix keeps the pages of a file that is
unlinked.

The manifest holds a SHA-256 of each file and the stamp it had when it was written. As long as the stamp is the same,
the file is taken for what was written; otherwise (restored from a backup, cut short, exchanged) the digest decides.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantdock.caching.stamps import Stamp, stamp

if sys.platform != "win32":
    import fcntl

FOLDER = "QUANTDOCK_CACHE_DIR"
MANIFEST = "manifest.json"
FORMAT = 1
"""Of the manifest and of the names in the weight files; a part of every key."""

_KEY = re.compile(r"[0-9a-f]{64}")
_ASIDE = re.compile(r"\.[0-9a-f]{64}\..*\.(partial|old)")
_MAX_MANIFEST = 10_000_000
_GRACE = 3600.0
"""Seconds after which an unfinished entry whose writer can't be asked after is nobody's."""

logger = logging.getLogger("quantdock")


class Damaged(Exception):  # noqa: N818 - a state of an entry, which no user ever sees as an error
    """An entry isn't what was written; the message says how."""


def default_folder() -> Path:
    """``QUANTDOCK_CACHE_DIR``, else ``quantdock/results`` in the user's cache folder."""
    named = os.environ.get(FOLDER)
    if named:
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "quantdock" / "results"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One result that was kept."""

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def key(self) -> str:
        """What it answers."""
        return self.folder.name

    @property
    def nbytes(self) -> int:
        """Bytes of its weight files."""
        return sum(file["stamp"][0] for file in self.manifest["files"].values())

    @property
    def made(self) -> float:
        """When it was written, in seconds since 1970."""
        return float(self.manifest["made"])

    @property
    def used(self) -> float:
        """When it was last used, in seconds since 1970; the folder's time of writing says it."""
        return self.folder.stat().st_mtime


class Store:
    """The entries in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    # Reading ------------------------------------------------------------------------------------------------------

    def entries(self) -> list[Entry]:
        """All entries, the least recently used first; what isn't readable as one is left out."""
        found: list[tuple[float, Entry]] = []
        for folder in self._folders(_KEY):
            with suppress(OSError, Damaged):
                entry = Entry(folder=folder, manifest=_read_manifest(folder))
                found.append((entry.used, entry))
        return [entry for _, entry in sorted(found, key=lambda item: item[0])]

    def find(self, key: str) -> Entry | None:
        """The entry for ``key`` with its files as they were written; one that is damaged is removed.

        Raises:
            OSError: there may be one, but it can't be read.
        """
        folder = self.folder / key
        try:
            entry = Entry(folder=folder, manifest=_read_manifest(folder))
            return self._verified(entry)
        except FileNotFoundError:
            if not folder.is_dir():
                return None
            self.discard(folder, "a file of it is missing")
        except Damaged as error:
            self.discard(folder, str(error))
        return None

    def touch(self, entry: Entry) -> None:
        """Note that an entry was used."""
        with suppress(OSError):
            os.utime(entry.folder)

    def _verified(self, entry: Entry) -> Entry:
        files = entry.manifest["files"]
        stamps = {name: stamp(entry.folder / name) for name in files}
        changed = [name for name, file in files.items() if tuple(file["stamp"]) != stamps[name]]
        for name in changed:
            if stamps[name][0] != files[name]["stamp"][0]:
                raise Damaged(f"{name} has {stamps[name][0]:,} bytes, {files[name]['stamp'][0]:,} were written")
            if _sha256(entry.folder / name) != files[name]["sha256"]:
                raise Damaged(f"{name} isn't what was written")
        if not changed:
            return entry
        manifest = {**entry.manifest, "files": {n: {**file, "stamp": stamps[n]} for n, file in files.items()}}
        with suppress(OSError):  # so that the digest isn't needed the next time
            _write_manifest(entry.folder, manifest)
        return Entry(folder=entry.folder, manifest=manifest)

    def _folders(self, pattern: re.Pattern[str]) -> list[Path]:
        try:
            return [path for path in self.folder.iterdir() if pattern.fullmatch(path.name)]
        except FileNotFoundError:
            return []

    # Writing ------------------------------------------------------------------------------------------------------

    def make_folder(self) -> None:
        """Make the cache's folder, for its owner only: what is in it is taken for the user's own work."""
        if not self.folder.is_dir():
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir(mode=0o700, exist_ok=True)

    def seal(self, staging: Path, facts: Mapping[str, Any]) -> None:
        """Finish what was written to ``staging``, before it is renamed: on disk for good, and with a manifest."""
        files = {}
        for path in sorted(staging.iterdir()):
            _flush(path)
            files[path.name] = {"stamp": stamp(path), "sha256": _sha256(path)}
        _write_manifest(staging, {"format": FORMAT, "made": time.time(), **facts, "files": files})
        _flush(staging)

    def make_room(self, needed: int, limit: int) -> list[Entry]:
        """Remove the least recently used entries until ``needed`` more bytes stay within ``limit``; returns them.

        What lies there under the name of an entry and can't be read as one goes first.
        """
        entries = self.entries()
        total = sum(entry.nbytes for entry in entries)
        if total + needed > limit:
            readable = {entry.folder for entry in entries}
            for folder in self._folders(_KEY):
                if folder not in readable:
                    self.discard(folder, "it can't be read")
        removed = []
        for entry in entries:
            if total + needed <= limit:
                break
            if self.discard(entry.folder, "room is needed"):
                total -= entry.nbytes
                removed.append(entry)
        return removed

    def discard(self, folder: Path, why: str) -> bool:
        """Remove an entry, whole and at once; false when that can't be done."""
        logger.info("result cache: %s is removed: %s", folder, why)
        aside = self.folder / f".{folder.name}.{secrets.token_hex(4)}.old"
        try:
            folder.rename(aside)
        except OSError:
            return not folder.exists()
        shutil.rmtree(aside, ignore_errors=True)
        return True

    def clear(self) -> int:
        """Remove all entries, readable or not, and what is left of unfinished ones; returns how many entries."""
        self.sweep()
        return sum(self.discard(folder, "asked for") for folder in self._folders(_KEY))

    def sweep(self) -> int:
        """Remove what killed processes left unfinished; returns how many that were."""
        count = 0
        for folder in self._folders(_ASIDE):
            if _abandoned(folder):
                shutil.rmtree(folder, ignore_errors=True)
                count += not folder.exists()
        return count


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """While the block runs, this process is at work in ``folder``; the claim ends with the process, however it ends."""
    if sys.platform == "win32":
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _abandoned(folder: Path) -> bool:
    """Whether nobody is at work in ``folder`` any more."""
    try:
        if sys.platform == "win32":
            return time.time() - folder.stat().st_mtime > _GRACE
        if time.time() - folder.stat().st_mtime < 1.0:
            return False  # made this moment; its maker may not have claimed it yet
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.close(descriptor)
    except OSError:
        return False
    return True


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, as far as this module relies on it.

    Raises:
        FileNotFoundError: there is none.
        Damaged: it isn't one that this version wrote.
    """
    path = folder / MANIFEST
    if path.stat().st_size > _MAX_MANIFEST:
        raise Damaged(f"{MANIFEST} is too long")
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{MANIFEST} isn't JSON ({error})") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("made"), int | float):
        raise Damaged(f"{MANIFEST} isn't of format {FORMAT}")
    files = data.get("files")
    if not isinstance(files, dict) or not files or not all(map(_is_file, files.items())):
        raise Damaged(f"{MANIFEST} lists no files")
    return data


def _is_file(item: tuple[str, object]) -> bool:
    name, file = item
    plain = Path(name).name == name and name != MANIFEST
    if not plain or not isinstance(file, dict) or not isinstance(file.get("sha256"), str):
        return False
    found = file.get("stamp")
    return isinstance(found, list) and len(found) == len(Stamp.__args__) and all(type(n) is int for n in found)  # type: ignore[attr-defined]


def _write_manifest(folder: Path, data: Mapping[str, Any]) -> None:
    descriptor, name = tempfile.mkstemp(prefix=f".{MANIFEST}.", dir=folder)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(folder / MANIFEST)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise


def _flush(path: Path) -> None:
    """On disk for good: after a power failure a renamed folder must not have files with holes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
