"""The Hub server of the tests serves what was committed to it, and answers as its docstring says."""

from __future__ import annotations

import hashlib
import os
import stat
import sys
from pathlib import Path

import pytest
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
from tests.hub_server import HubServer, OlahUnavailableError, olah_environment

pytest_plugins = ["tests.hub_fixtures"]
pytestmark = pytest.mark.hub


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def download(server: HubServer, repo_id: str, name: str, cache: Path, revision: str | None = None) -> Path:
    return Path(
        hf_hub_download(repo_id, name, revision=revision, endpoint=server.endpoint, cache_dir=cache, token=False)
    )


def test_files_come_back_byte_for_byte(hub_server: HubServer, tmp_path: Path) -> None:
    files = {
        "config.json": b'{"model_type": "toy"}\r\n',
        "sub folder/x.txt": b"in a folder\n",
        "empty.txt": b"",
        "model.safetensors": hashlib.shake_256(b"weights").digest(12_000_000),
        # Neither of these attributes may change a byte.
        ".gitattributes": b"* text=auto eol=lf\n*.safetensors filter=lfs diff=lfs merge=lfs -text\n",
    }
    sha = hub_server.add_model("bytes/toy", write(tmp_path / "files", files))
    for name, content in files.items():
        path = download(hub_server, "bytes/toy", name, tmp_path / "cache")
        assert path.read_bytes() == content
        assert f"/snapshots/{sha}/" in path.as_posix()


def test_a_snapshot_holds_the_files_that_patterns_choose(hub_server: HubServer, tmp_path: Path) -> None:
    shards = {f"model.fp16-{i:05}-of-00040.safetensors": bytes([i]) * 5000 for i in range(1, 41)}
    others = {"config.json": b"{}", "model.safetensors": b"another variant", "README.md": b"---\nlicense: mit\n---\n"}
    sha = hub_server.add_model("patterns/toy", write(tmp_path / "files", shards | others))
    snapshot = Path(
        snapshot_download(
            "patterns/toy",
            allow_patterns=["*.json", "*.fp16-*.safetensors"],
            endpoint=hub_server.endpoint,
            cache_dir=tmp_path / "cache",
            token=False,
        )
    )
    assert snapshot.name == sha
    assert {path.name: path.read_bytes() for path in snapshot.iterdir()} == shards | {"config.json": b"{}"}


def test_a_sha_keeps_its_content_after_a_new_commit(hub_server: HubServer, tmp_path: Path) -> None:
    old = hub_server.add_model("pinned/toy", write(tmp_path / "old", {"config.json": b"old", "gone.txt": b""}))
    new = hub_server.add_model("pinned/toy", write(tmp_path / "new", {"config.json": b"new"}))
    side = hub_server.add_model("pinned/toy", write(tmp_path / "side", {"config.json": b"side"}), revision="side")

    def content(revision: str | None) -> bytes:
        return download(hub_server, "pinned/toy", "config.json", tmp_path / "cache", revision).read_bytes()

    revisions = (None, "main", new, old, "side", side)
    assert [content(revision) for revision in revisions] == [b"new", b"new", b"new", b"old", b"side", b"side"]

    api = HfApi(endpoint=hub_server.endpoint, token=False)
    assert api.list_repo_files("pinned/toy") == ["config.json"]
    assert api.list_repo_files("pinned/toy", revision=old) == ["config.json", "gone.txt"]
    assert api.model_info("pinned/toy", revision="main").sha == new
    branches = api.list_repo_refs("pinned/toy").branches
    assert {branch.name: branch.target_commit for branch in branches} == {"main": new, "side": side}


def test_a_missing_file_is_known_as_such_at_a_sha_only(hub_server: HubServer, tmp_path: Path) -> None:
    sha = hub_server.add_model("missing/file", write(tmp_path / "files", {"config.json": b"{}"}))
    api = HfApi(endpoint=hub_server.endpoint, token=False)
    assert api.model_info("missing/file", revision="main").sha == sha
    with pytest.raises(EntryNotFoundError, match="Entry Not Found"):
        download(hub_server, "missing/file", "missing.json", tmp_path / "cache", sha)
    # The Hub would raise the same error at a branch. olah does not, see tests/hub_server.py.
    with pytest.raises(RepositoryNotFoundError, match="Repository Not Found"):
        download(hub_server, "missing/file", "missing.json", tmp_path / "cache")


def test_a_missing_repository(hub_server: HubServer, tmp_path: Path) -> None:
    with pytest.raises(RepositoryNotFoundError, match="Repository Not Found"):
        download(hub_server, "missing/repository", "config.json", tmp_path)
    with pytest.raises(RepositoryNotFoundError, match="Repository Not Found"):
        snapshot_download("missing/repository", endpoint=hub_server.endpoint, cache_dir=tmp_path, token=False)
    with pytest.raises(RepositoryNotFoundError, match="Repository Not Found"):
        HfApi(endpoint=hub_server.endpoint, token=False).list_repo_files("missing/repository")


def test_a_missing_branch_is_answered_like_a_missing_repository(hub_server: HubServer, tmp_path: Path) -> None:
    hub_server.add_model("missing/branch", write(tmp_path / "files", {"config.json": b"{}"}))
    # The Hub would raise RevisionNotFoundError, see tests/hub_server.py.
    with pytest.raises(RepositoryNotFoundError, match="Repository Not Found"):
        download(hub_server, "missing/branch", "config.json", tmp_path / "cache", "absent")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff" * 121, r"121 bytes and is not UTF-8"),
        (b"\xff" * 149, r"149 bytes and is not UTF-8"),
        (b"version https://git-lfs.github.com/spec/v1\n" + b"x" * 90, "is an LFS pointer"),
    ],
)
def test_a_file_that_olah_cannot_serve_is_refused(
    hub_server: HubServer, tmp_path: Path, content: bytes, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        hub_server.add_model("refused/toy", write(tmp_path, {"x.bin": content}))


def test_files_of_a_size_next_to_the_refused_ones_are_served(hub_server: HubServer, tmp_path: Path) -> None:
    files = {"a.bin": b"\xff" * 120, "b.bin": b"\xff" * 150, "c.txt": b"x" * 130}
    hub_server.add_model("sizes/toy", write(tmp_path / "files", files))
    snapshot = Path(
        snapshot_download("sizes/toy", endpoint=hub_server.endpoint, cache_dir=tmp_path / "cache", token=False)
    )
    assert {path.name: path.read_bytes() for path in snapshot.iterdir()} == files


@pytest.mark.skipif(os.name == "nt", reason="a script cannot stand for a program there")
def test_a_server_that_does_not_start_shows_its_log(tmp_path: Path) -> None:
    program = write(tmp_path, {"olah-cli": f"#!{sys.executable}\nraise SystemExit('no such option')\n".encode()})
    (program / "olah-cli").chmod(stat.S_IRWXU)
    with (
        pytest.raises(RuntimeError, match=r"(?s)olah ended with status 1 before it answered.*no such option"),
        HubServer(program / "olah-cli", tmp_path / "hub"),
    ):
        pytest.fail("the server started")


@pytest.mark.slow
def test_an_environment_that_cannot_be_made_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(OlahUnavailableError, match=r"(?s)pip install .* ended with status 1: .*olah"):
        olah_environment(tmp_path)
