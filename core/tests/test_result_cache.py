"""The store of the result cache, its stamps and its commands, on real files and with real processes."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from quantdock import ConfigError, LoadOptions
from quantdock.caching import stamps
from quantdock.caching.key import OPTIONS
from quantdock.caching.store import MANIFEST, Store, claimed
from quantdock.cli.app import app
from quantdock.saving import aside

KEY = "ab" * 32
OTHER = "cd" * 32

MakeEntry = Callable[..., Path]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    folder = tmp_path / "results"
    monkeypatch.setenv("QUANTDOCK_CACHE_DIR", str(folder))
    found = Store(folder)
    found.make_folder()
    return found


@pytest.fixture
def make(store: Store) -> MakeEntry:
    """Make an entry with one tensor, as a load does."""

    def run(key: str = KEY, *, size: int = 1000, used: float | None = None) -> Path:
        with aside(store.folder / key) as staging, claimed(staging):
            save_file({"x": torch.arange(size, dtype=torch.float32)}, staging / "model.safetensors")
            store.seal(staging, {"source": {"name": "somewhere"}, "quantize": "int8"})
        folder = store.folder / key
        if used is not None:
            os.utime(folder, (used, used))
        return folder

    return run


def names(store: Store) -> set[str]:
    return {path.name for path in store.folder.iterdir()}


# What is found --------------------------------------------------------------------------------------------------------


def test_what_was_made_is_found(store: Store, make: MakeEntry) -> None:
    assert store.find(KEY) is None
    folder = make()
    entry = store.find(KEY)
    assert entry is not None
    assert entry.folder == folder
    assert entry.nbytes == (folder / "model.safetensors").stat().st_size
    assert abs(entry.made - time.time()) < 60
    assert store.find(OTHER) is None
    assert store.folder.stat().st_mode & 0o077 == 0, "only its owner may put entries there"


def test_a_file_that_was_cut_short(store: Store, make: MakeEntry) -> None:
    file = make() / "model.safetensors"
    os.truncate(file, file.stat().st_size - 4)
    assert store.find(KEY) is None
    assert names(store) == set()


def test_a_byte_that_was_changed_with_the_time_put_back(store: Store, make: MakeEntry) -> None:
    file = make() / "model.safetensors"
    before = file.stat()
    with file.open("r+b") as handle:
        handle.seek(-1, os.SEEK_END)
        handle.write(b"\x55")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    assert store.find(KEY) is None
    assert names(store) == set()


def test_somebody_elses_file(store: Store, make: MakeEntry) -> None:
    file = make() / "model.safetensors"
    save_file({"x": torch.zeros(1000)}, file.with_name("other"))
    file.with_name("other").replace(file)
    assert store.find(KEY) is None


@pytest.mark.parametrize(
    "manifest",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b'{"format": 1}',
        b'{"format": 99, "made": 1, "files": {"model.safetensors": {"stamp": [1, 1, 1, 1], "sha256": ""}}}',
        b'{"format": 1, "made": 1, "files": {}}',
        b'{"format": 1, "made": 1, "files": {"../model.safetensors": {"stamp": [1, 1, 1, 1], "sha256": ""}}}',
        b'{"format": 1, "made": 1, "files": {"model.safetensors": {"stamp": ["1", 1, 1, 1], "sha256": ""}}}',
        b'{"format": 1, "made": 1, "files": {"model.safetensors": {"stamp": [1], "sha256": ""}}}',
        b"[" * 100_000,
    ],
)
def test_a_manifest_that_is_none(store: Store, make: MakeEntry, manifest: bytes) -> None:
    (make() / MANIFEST).write_bytes(manifest)
    assert store.entries() == []
    assert store.find(KEY) is None
    assert names(store) == set()


@pytest.mark.parametrize("file", [MANIFEST, "model.safetensors"])
def test_a_file_that_is_gone(store: Store, make: MakeEntry, file: str) -> None:
    (make() / file).unlink()
    assert store.find(KEY) is None
    assert names(store) == set()


def test_one_that_came_back_from_a_backup_is_looked_at_once(
    store: Store, make: MakeEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make()
    shutil.copytree(folder, folder.with_name("backup"))
    shutil.rmtree(folder)
    folder.with_name("backup").rename(folder)
    assert store.find(KEY) is not None
    # By now its new stamp is written down: it is found without being read.
    monkeypatch.setattr("hashlib.file_digest", None)
    assert store.find(KEY) is not None


# What is removed ------------------------------------------------------------------------------------------------------


def test_the_least_recently_used_go_first(store: Store, make: MakeEntry) -> None:
    keys = [f"{index:064x}" for index in range(4)]
    now = time.time()
    size = sum(file.stat().st_size for file in make(keys[0], used=now - 40).glob("*.safetensors"))
    for index in range(1, 4):
        make(keys[index], used=now - 40 + index)
    first = store.find(keys[0])
    assert first is not None
    store.touch(first)
    assert [entry.key for entry in store.entries()] == [*keys[1:], keys[0]]
    removed = store.make_room(size, 3 * size)
    assert [entry.key for entry in removed] == keys[1:3]
    assert {entry.key for entry in store.entries()} == {keys[0], keys[3]}
    assert store.make_room(size, 3 * size) == []


def test_what_cannot_be_read_makes_room(store: Store, make: MakeEntry) -> None:
    (make(OTHER) / MANIFEST).write_text("{}")
    store.make_room(10, 5)
    assert names(store) == set()


def test_what_is_mapped_stays_valid(store: Store, make: MakeEntry) -> None:
    folder = make(size=100_000)
    mapped = load_file(folder / "model.safetensors")["x"]
    assert store.clear() == 1
    assert names(store) == set()
    assert torch.equal(mapped, torch.arange(100_000, dtype=torch.float32))


WRITER = """
import sys, time, torch
from pathlib import Path
from safetensors.torch import save_file
from quantdock.caching.store import Store, claimed
from quantdock.saving import aside

store = Store(Path(sys.argv[1]))
tensors = {f"x{index}": torch.full((1 << 18,), float(index)) for index in range(8)}
print("ready", flush=True)
for number in range(1_000_000):
    with aside(store.folder / f"{number:064x}") as staging, claimed(staging):
        for index in range(2):
            save_file(tensors, staging / f"part{index}.safetensors")
        store.seal(staging, {"source": {}, "quantize": "x"})
    store.make_room(0, 50_000_000)
"""


def test_killed_at_any_moment(store: Store) -> None:
    """Whatever entry is there is whole; what is unfinished goes with the next sweep, and nothing else does."""
    draw = random.Random(7)
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(store.folder)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(draw.uniform(0.05, 0.6))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        for entry in store.entries():
            found = store.find(entry.key)
            assert found is not None, "an entry that isn't whole"
            for index in range(2):
                tensors = load_file(found.folder / f"part{index}.safetensors")
                assert all(bool((tensors[f"x{index}"] == index).all()) for index in range(8))
        store.clear()
        time.sleep(1.1)  # what was made within the last second might not have been claimed yet
        store.sweep()
        assert names(store) == set()


def test_what_somebody_is_writing_is_left_alone(store: Store) -> None:
    with aside(store.folder / KEY) as staging, claimed(staging):
        os.utime(staging, (1, 1))
        assert store.sweep() == 0
        assert staging.is_dir()
    left = store.folder / f".{KEY}.x1.partial"
    left.mkdir()
    os.utime(left, (1, 1))
    assert store.sweep() == 1
    assert not left.exists()


# Stamps and keys ------------------------------------------------------------------------------------------------------


def test_two_writes_within_a_tick_have_two_stamps(tmp_path: Path) -> None:
    """Of the same size, one right after the other, with the time put back: what a clock tick could hide."""
    file = tmp_path / "file"
    file.write_bytes(b"one")
    for text in (b"two", b"six", b"ten"):
        (before,) = stamps.settled_stamps([file])
        status = file.stat()
        with file.open("r+b") as handle:
            handle.write(text)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert stamps.stamp(file) != before


def test_every_option_of_a_load_has_its_place_in_the_key_or_a_reason() -> None:
    assert OPTIONS.keys() == {field.name for field in dataclasses.fields(LoadOptions)}


def test_cache_is_a_switch() -> None:
    with pytest.raises(ConfigError, match="cache='/tmp': expected True or False"):
        LoadOptions(cache="/tmp")  # type: ignore[arg-type]


# The commands ---------------------------------------------------------------------------------------------------------


def run_cache(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["cache", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout


def test_list(store: Store, make: MakeEntry) -> None:
    make(used=time.time() - 7200)
    code, out = run_cache("list")
    assert code == 0
    assert "somewhere" in out
    assert "2h ago" in out
    code, out = run_cache("list", "--json")
    (entry,) = json.loads(out)["entries"]
    assert entry["entry"] == KEY
    assert entry["quantize"] == "int8"
    assert entry["bytes"] > 4000


def test_list_an_empty_one(store: Store) -> None:
    store.folder.rmdir()
    assert json.loads(run_cache("list", "--json")[1])["entries"] == []
    assert json.loads(run_cache("clear", "--json")[1])["removed"] == 0


def test_clear_some(store: Store, make: MakeEntry) -> None:
    make(KEY, used=time.time() - 3 * 86400)
    make(OTHER)
    assert run_cache("clear", "--older-than", "7d")[1].strip().startswith("removed")
    assert names(store) == {KEY, OTHER}
    assert json.loads(run_cache("clear", "--older-than", "48h", "--json")[1])["removed"] == 1
    assert names(store) == {OTHER}
    assert run_cache("clear", "abab")[0] == 1
    assert run_cache("clear", "--older-than", "soon")[0] == 2
    assert run_cache("clear", OTHER[:6])[0] == 0
    assert names(store) == set()


def test_clear_all_takes_what_is_left_over_too(store: Store, make: MakeEntry) -> None:
    (make(OTHER) / MANIFEST).unlink()
    make(KEY)
    left = store.folder / f".{KEY}.x1.partial"
    left.mkdir()
    os.utime(left, (1, 1))
    assert json.loads(run_cache("clear", "--json")[1])["removed"] == 2
    assert names(store) == set()


def test_commands_import_no_torch() -> None:
    code = (
        "import sys\nfrom quantdock.cli.app import app\n"
        "app(['cache', 'list'], standalone_mode=False)\nprint('torch' in sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "False"
