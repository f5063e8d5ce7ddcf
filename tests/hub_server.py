"""A Hub of our own for tests: olah, a mirror of the Hugging Face Hub, serving git repositories of this machine.

olah gets a virtual environment of its own, because what it depends on must not decide what the tests run with. It is
started offline, so it answers from `mirrors-path` alone and never asks huggingface.co. It needs the `git` program.

What olah 0.5.4 answers to huggingface_hub 2.4.0 when it runs like this, found by trying. Like the Hub:

- `hf_hub_download` and `snapshot_download`, with patterns, sub-folders, a hundred shards, files of 60 MB and empty
  files; at a branch, a tag, a full or short sha. A sha keeps giving what it gave, whatever is committed later.
- HEAD on a file has `ETag` (git's blob hash, unquoted), `X-Repo-Commit` and `Content-Length`.
- `list_repo_files`, `list_repo_tree`, `list_repo_refs`, `get_paths_info`, `resolve_revision`, `revision_exists`,
  `file_exists`, `get_safetensors_metadata`, and `model_info` with a revision. (Siblings have no size: `blobs` is
  ignored.)
- A missing repository at a branch, or at the default revision: RepositoryNotFoundError.
- A missing file at a full sha: EntryNotFoundError (its remote kind).

Unlike the Hub, and not smoothed over here:

- A missing file at a branch, a tag or a short sha is answered with 401 and `X-Error-Code: RepoNotFound`, where the Hub
  says 404 and EntryNotFound. So `hf_hub_download` raises RepositoryNotFoundError. A client that has to tell the two
  apart resolves the revision first (`resolve_revision`, or `model_info` with a revision) and asks at the sha it gets.
- A missing branch, tag or short sha gives the same 401, so RepositoryNotFoundError and never RevisionNotFoundError.
- A missing repository at a full sha gives EntryNotFoundError (LocalEntryNotFoundError from `snapshot_download`).
- A full sha that an existing repository lacks is status 500. `hf_hub_download` repeats that for 23 seconds, then raises
  LocalEntryNotFoundError (as `snapshot_download` does at once, for a 404). So is GET, but not HEAD, of a missing file.
  After a 500 the client's next request may find its connection reset: call `huggingface_hub.close_session()`.
- `model_info` without a revision and `repo_exists` say that no repository exists; `list_repo_commits` raises KeyError.
- A missing file's answer has no `X-Repo-Commit`, so huggingface_hub does not remember in its cache that it is missing.
- GET sends neither `Content-Length` nor `ETag` and ignores `Range`: an interrupted download starts again.
- A folder's path is answered like a file's. A branch with a slash in its name is listed but not served.
- No LFS, no Xet: sha256 is never known. A file of 121 to 149 bytes that is not UTF-8 breaks its folder's listing, and
  a file that looks like an LFS pointer breaks its own download; `add_model` refuses both.
- Authentication, gated repositories, `list_models` and `whoami` do not exist.

A variant (`model.fp16.safetensors`) is a file name like any other; choosing one is the client's business.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

from filelock import FileLock

OLAH_VERSION = "0.5.4"

_HOST = "127.0.0.1"
_GIT_IDENTITY = ("-c", "user.name=Hub Test", "-c", "user.email=hub-test@example.invalid")
_PROXY_VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
_INSTALL_SECONDS = 900.0
_PORT_ATTEMPTS = 5


class OlahUnavailableError(RuntimeError):
    """olah cannot be had on this machine; the message says why."""


def proxy_variables(environment: Mapping[str, str]) -> list[str]:
    """The names in `environment` that configure proxies for HTTP clients, in upper or lower case."""
    return [name for name in environment if name.lower() in _PROXY_VARIABLES]


def olah_environment(cache: Path) -> Path:
    """Return the path of `olah-cli` in a virtual environment below `cache`, which pip fills on the first call.

    Later calls, in whatever process, only check that the command still starts; while one call installs, others wait.
    An environment that was left half finished, or was moved, fails that check and is made again.

    Raises:
        OlahUnavailableError: there is no git, or pip cannot install olah (no network, for example).
    """
    if shutil.which("git") is None:
        raise OlahUnavailableError("olah reads its mirrors with the `git` program, which is not on PATH")
    name = f"olah-{OLAH_VERSION}-py{sys.version_info.major}.{sys.version_info.minor}"
    folder = cache.absolute() / name
    bin_folder, suffix = ("Scripts", ".exe") if os.name == "nt" else ("bin", "")
    python, olah_cli = (folder / bin_folder / f"{program}{suffix}" for program in ("python", "olah-cli"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{name}.lock"), timeout=2 * _INSTALL_SECONDS):
        if not _works(python, olah_cli):
            _install(sys.executable, "-I", "-m", "venv", "--clear", str(folder))
            _install(str(python), "-I", "-m", "pip", "install", "--no-input", f"olah=={OLAH_VERSION}")
            if not _works(python, olah_cli):
                raise OlahUnavailableError(f"pip installed olah {OLAH_VERSION}, but `{olah_cli} --help` fails")
    return olah_cli


class HubServer:
    """An olah process and the git repositories that it serves; a context manager that starts and stops it.

    Everything is written below `root`, so servers with different roots share nothing. Models can be added before the
    server starts and while it runs.
    """

    def __init__(self, olah_cli: Path, root: Path, *, start_timeout: float = 90.0) -> None:
        self._olah_cli = olah_cli.absolute()
        self._root = root.absolute()
        self._mirrors = self._root / "mirrors"
        self._log = self._root / "olah.out"
        self._start_timeout = start_timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._endpoint: str | None = None
        self._mirrors.mkdir(parents=True, exist_ok=True)

    @property
    def endpoint(self) -> str:
        """What clients pass as `endpoint`, or have as `HF_ENDPOINT`; it is known while the server runs."""
        if self._endpoint is None:
            raise RuntimeError("this server is not running; use it as a context manager")
        return self._endpoint

    def add_model(self, repo_id: str, folder: Path, *, revision: str = "main", message: str = "Add files") -> str:
        """Commit the files below `folder` to branch `revision` of model `repo_id`, and return the commit's sha.

        Repository and branch are created when they are absent; a new branch has no history. The commit holds exactly
        the files of `folder`, so a file that an earlier commit had and `folder` lacks is gone. Bytes are stored as they
        are, whatever a `.gitattributes` among them says; links to files are followed.

        Raises:
            ValueError: olah would not serve the name, the branch or one of the files (see the module's docstring).
        """
        organization, _, name = repo_id.partition("/")
        if not organization or not name or "/" in name:
            raise ValueError(f"{repo_id!r} is not of the form ORG/NAME")
        if "/" in revision:
            raise ValueError(f"olah does not serve {revision!r}: a branch must have no slash in its name")
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        if not files:
            raise ValueError(f"{folder} holds no files to commit")
        for name_in_commit, path in files.items():
            _refuse_unservable(name_in_commit, path)

        repository = self._mirrors / "models" / organization / name
        if not repository.exists():
            _create_repository(repository)
        paths = "".join(f"{path.absolute()}\n" for path in files.values())
        # Weights do not compress, and hashing is what takes the time otherwise.
        store = ("-c", "core.compression=0", "hash-object", "-w", "--no-filters", "--stdin-paths")
        blobs = _git(repository, *store, stdin=paths).split()
        entries = "".join(f"100644 {blob}\t{name}\0" for name, blob in zip(files, blobs, strict=True))
        with tempfile.TemporaryDirectory(dir=self._root) as scratch:
            index = str(Path(scratch, "index"))
            _git(repository, "update-index", "-z", "--index-info", stdin=entries, index=index)
            tree = _git(repository, "write-tree", index=index)
        branch = f"refs/heads/{revision}"
        parent = _git(repository, "for-each-ref", "--format=%(objectname)", branch)
        parents = ("-p", parent) if parent else ()
        commit = _git(repository, *_GIT_IDENTITY, "commit-tree", *parents, tree, stdin=message)
        _git(repository, "update-ref", branch, commit)
        return commit

    def __enter__(self) -> HubServer:
        if self._process is not None:
            raise RuntimeError("this server runs already")
        deadline = time.monotonic() + self._start_timeout
        with self._probe() as probe:
            for _ in range(_PORT_ATTEMPTS):
                port = _free_port()
                if self._start(port, probe, deadline):
                    self._endpoint = f"http://{_HOST}:{port}"
                    return self
        raise RuntimeError(f"{_PORT_ATTEMPTS} free ports in a row were taken by others before olah could have them")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    def _start(self, port: int, probe: str, deadline: float) -> bool:
        """Start olah on `port` and wait until it serves `probe`; False when another process has taken the port."""
        config = self._root / "olah.toml"
        config.write_text(_configuration(port, self._mirrors, self._root / "cache"), encoding="utf-8")
        command = [str(self._olah_cli), "-c", str(config), "--log-path", str(self._root / "logs")]
        with self._log.open("wb") as log:
            self._process = process = subprocess.Popen(
                command,
                cwd=self._root,
                env=_child_environment(proxies=False),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            while not _serves(port, probe):
                status = process.poll()
                if status is not None:
                    log_tail = self._log_tail()
                    if "address already in use" in log_tail.lower():
                        self._stop()
                        return False
                    raise RuntimeError(f"olah ended with status {status} before it answered\n{log_tail}")
                if time.monotonic() > deadline:
                    raise RuntimeError(f"olah did not answer within {self._start_timeout:g} s\n{self._log_tail()}")
                time.sleep(0.05)
        except BaseException:
            self._stop()
            raise
        return True

    def _stop(self) -> None:
        process, self._process, self._endpoint = self._process, None, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    @contextlib.contextmanager
    def _probe(self) -> Iterator[str]:
        """An empty repository under a name that no other server has, so that its answer is known to be ours."""
        name = f"probe-{uuid.uuid4().hex}"
        repository = self._mirrors / "models" / "probe" / name
        _create_repository(repository)
        try:
            yield f"probe/{name}"
        finally:
            shutil.rmtree(repository)

    def _log_tail(self) -> str:
        text = self._log.read_text(encoding="utf-8", errors="replace")
        return f"--- the end of {self._log} ---\n{text[-4000:]}"


def _works(python: Path, olah_cli: Path) -> bool:
    """Whether the environment holds the right olah and its command starts."""
    version = "from importlib.metadata import version; print(version('olah'))"
    try:
        found = _run(str(python), "-I", "-c", version, timeout=60)
        return found.stdout.strip() == OLAH_VERSION and _run(str(olah_cli), "--help", timeout=120).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _install(*command: str) -> None:
    try:
        finished = _run(*command, timeout=_INSTALL_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise OlahUnavailableError(f"`{' '.join(command)}` failed: {error}") from error
    if finished.returncode != 0:
        said = " ".join(finished.stdout.split())[-400:]  # one line, for the summary of skipped tests
        raise OlahUnavailableError(f"`{' '.join(command)}` ended with status {finished.returncode}: {said}")


def _run(*command: str, timeout: float) -> subprocess.CompletedProcess[str]:
    """Run `command` to its end; its `stdout` is what it wrote to either stream."""
    return subprocess.run(
        command,
        env=_child_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        timeout=timeout,
        check=False,
    )


def _child_environment(*, proxies: bool = True) -> dict[str, str]:
    """Our environment without what is meant for our Python and without the user's git settings."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "GIT_", "OLAH_"))}
    for name in [] if proxies else proxy_variables(ours):
        del ours[name]
    return ours | {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}


def _git(repository: Path, *arguments: str, stdin: str = "", index: str | None = None) -> str:
    """Run git on `repository` and return what it printed, stripped; what it complains about is raised."""
    finished = subprocess.run(
        ["git", f"--git-dir={repository}", *arguments],
        env=_child_environment() | ({} if index is None else {"GIT_INDEX_FILE": index}),
        input=stdin,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    if finished.returncode != 0:
        raise RuntimeError(f"git {' '.join(arguments)} failed on {repository}: {finished.stderr.strip()}")
    return finished.stdout.strip()


def _create_repository(repository: Path) -> None:
    repository.mkdir(parents=True)
    _git(repository, "init", "--quiet", "--bare")
    _git(repository, "symbolic-ref", "HEAD", "refs/heads/main")


def _refuse_unservable(name: str, path: Path) -> None:
    """Raise ValueError for a file that git drops, or that olah cannot serve (files of pointer size are text to it)."""
    if ".git" in name.lower().split("/") or "\n" in str(path.absolute()):
        raise ValueError(f"{str(path)!r} cannot be committed: a part of its path is named .git, or has a line break")
    if not 120 < path.stat().st_size < 150:
        return
    content = path.read_bytes()
    try:
        content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} has {len(content)} bytes and is not UTF-8; olah {OLAH_VERSION} cannot serve such files of 121 to "
            "149 bytes. Make it larger or smaller."
        ) from error
    if content.startswith(b"version https://git-lfs.github.com/spec/"):
        raise ValueError(f"{path} is an LFS pointer, and these repositories have no LFS; commit the file itself")


def _configuration(port: int, mirrors: Path, cache: Path) -> str:
    """olah's configuration file. A JSON string is a TOML string too."""
    return (
        "[basic]\n"
        f'host = "{_HOST}"\n'
        f"port = {port}\n"
        f"repos-path = {json.dumps(str(cache))}\n"
        f"mirrors-path = [{json.dumps(str(mirrors))}]\n"
        "[accessibility]\n"
        "offline = true\n"
    )


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind((_HOST, 0))
        port: int = listener.getsockname()[1]
    return port


def _serves(port: int, repo_id: str) -> bool:
    """Whether a server on `port` has `repo_id`. (`http.client` knows no proxies.)"""
    connection = http.client.HTTPConnection(_HOST, port, timeout=5)
    try:
        connection.request("GET", f"/api/models/{repo_id}/refs")
        response = connection.getresponse()
        response.read()
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
    return response.status == 200
