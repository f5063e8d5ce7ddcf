"""Where a checkpoint comes from: a local folder, one file, or a repository on the Hub."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from quantdock.errors import SourceError
from quantdock.options import LoadOptions, as_path


class Source(ABC):
    """The files a load may use; nothing outside of it is read."""

    def __init__(self, name: str) -> None:
        self.name = name
        """What the user named."""

    @property
    def single_file(self) -> Path | None:
        """The weight file, when the user named one file instead of a folder or repository."""
        return None

    @property
    @abstractmethod
    def root(self) -> Path:
        """The folder that the source's files are in."""

    @abstractmethod
    def find(self, name: str) -> Path | None:
        """The local path of one file, downloaded if need be; ``None`` when the source doesn't have it."""

    @abstractmethod
    def listing(self) -> list[str]:
        """Names of the files at the source's top level that can be known without downloading one."""

    def fetch(self, names: Sequence[str]) -> dict[str, Path]:
        """Local paths of several files; those that the source doesn't have are absent."""
        return {name: path for name in names if (path := self.find(name)) is not None}

    def is_inside(self, path: Path) -> bool:
        """Whether ``path``, links followed, is a file this source may use."""
        return path.resolve().is_relative_to(self.root.resolve())

    @property
    def identity(self) -> dict[str, str]:
        """What pins the source's content, for the report (kind, path or repository, revision)."""
        return {"kind": type(self).__name__.removesuffix("Source").lower(), "name": self.name}


class FolderSource(Source):
    """A local folder."""

    def __init__(self, name: str, folder: Path) -> None:
        super().__init__(name)
        self._folder = folder

    @property
    def root(self) -> Path:
        return self._folder

    def find(self, name: str) -> Path | None:
        path = self._folder / name
        return path if path.is_file() else None

    def listing(self) -> list[str]:
        return sorted(entry.name for entry in self._folder.iterdir() if entry.is_file())


class FileSource(FolderSource):
    """One weight file; its config is looked for beside it."""

    def __init__(self, name: str, file: Path) -> None:
        super().__init__(name, file.parent)
        self._file = file

    @property
    def single_file(self) -> Path | None:
        return self._file

    def is_inside(self, path: Path) -> bool:
        # The user named this very file, wherever a link to it leads.
        return path == self._file or super().is_inside(path)


class HubSource(Source):
    """A repository on the Hub (or a mirror of it: ``HF_ENDPOINT``), at one commit for the whole load.

    Files are fetched one by one as they are needed, so that only what a load uses is downloaded. Offline
    (``local_files_only=True`` or ``HF_HUB_OFFLINE=1``) only the local cache is looked at, and no request is made.
    """

    def __init__(self, repo_id: str, options: LoadOptions) -> None:
        super().__init__(repo_id)
        from huggingface_hub import constants  # imported here: a local load needs no HTTP client

        self._options = options
        self._cache_dir = None if options.cache_dir is None else as_path(options.cache_dir)
        self._local = options.local_files_only or constants.is_offline_mode()
        self._snapshot: Path | None = None
        self._forced: set[str] = set()

    @cached_property
    def commit(self) -> str:
        """The commit that the revision stands for; asked for once, then every file is of the same state.

        Raises:
            SourceError: there is no such repository or revision, or it can't be known.
        """
        from huggingface_hub import HfApi

        # A mirror may know branches, but not which one is the default.
        revision = self._options.revision or "main"
        with self._explained():
            return (
                HfApi(token=self._options.token)
                .resolve_revision(self.name, revision=revision, cache_dir=self._cache_dir, local_files_only=self._local)
                .resolved
            )

    @property
    def root(self) -> Path:
        if self._snapshot is None:
            raise SourceError(f"{self.name}: no file of this repository has been fetched yet")
        return self._snapshot

    def find(self, name: str) -> Path | None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        with self._explained():
            try:
                path = Path(
                    hf_hub_download(
                        self.name,
                        name,
                        revision=self.commit,
                        cache_dir=self._cache_dir,
                        token=self._options.token,
                        local_files_only=self._local,
                        force_download=self._options.force_download and name not in self._forced and not self._local,
                    )
                )
            except LocalEntryNotFoundError:
                if self._local:
                    return None  # the repository is cached, this file isn't
                raise
            except EntryNotFoundError:
                return None
        self._forced.add(name)
        self._snapshot = path.parents[len(Path(name).parts) - 1]
        return path

    def fetch(self, names: Sequence[str]) -> dict[str, Path]:
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(max_workers=4) as pool:
            found = dict(zip(names, pool.map(self.find, names), strict=True))
        return {name: path for name, path in found.items() if path is not None}

    def listing(self) -> list[str]:
        if self._local:
            folder = self._snapshot
            return [] if folder is None else sorted(entry.name for entry in folder.iterdir() if entry.is_file())
        from huggingface_hub import HfApi

        with self._explained():
            return list(HfApi(token=self._options.token).list_repo_files(self.name, revision=self.commit))

    def is_inside(self, path: Path) -> bool:
        # A snapshot's files are links into the same repository's blobs folder of the cache.
        return path.resolve().is_relative_to(self.root.parent.parent.resolve())

    @property
    def identity(self) -> dict[str, str]:
        return super().identity | {"revision": self.commit}

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what the Hub says into a ``SourceError``; anything that isn't the Hub's doing passes unchanged."""
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
            RevisionResolutionError,
        )

        folder = f"If it is meant as a folder, there is none at {Path(self.name).absolute()}"
        unreachable = (
            "it isn't in the local cache, and this load is offline" if self._local else "no Hub can be reached"
        )
        reasons: list[tuple[type[Exception], str]] = [
            (GatedRepoError, "access to it is restricted; ask for access on its page and pass token="),
            (RepositoryNotFoundError, f"there is no such repository, or it is private (pass token=). {folder}"),
            (RevisionNotFoundError, f"it has no revision {self._options.revision!r}"),
            (RevisionResolutionError, f"{unreachable}. {folder}"),
            (LocalEntryNotFoundError, f"{unreachable}. {folder}"),
            (HFValidationError, f"it is neither an existing path nor a valid repository id (ORG/NAME). {folder}"),
            (HfHubHTTPError, "the Hub refused the request"),
        ]
        try:
            yield
        except tuple(kind for kind, _ in reasons) as error:
            reason = next(reason for kind, reason in reasons if isinstance(error, kind))
            said = (str(error).strip().splitlines() or [""])[0]
            raise SourceError(f"{self.name!r}: {reason}. ({type(error).__name__}: {said})") from error


def open_source(named: str | os.PathLike[str], options: LoadOptions) -> Source:
    """The source a user names: an existing folder or file, else a repository on the Hub.

    Raises:
        SourceError: it can only be a path, and doesn't exist.
    """
    path = as_path(named)
    name = os.fspath(named)
    if path.is_dir():
        return FolderSource(name, path)
    if path.is_file():
        return FileSource(name, path)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise SourceError(f"{path.absolute()} doesn't exist. Name a folder, a weight file, or a Hub id (ORG/NAME).")
    return HubSource(name, options)
