"""Where a checkpoint comes from: a local folder, one file, or a repository on the Hub."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from quantdock.errors import SourceError
from quantdock.options import LoadOptions, as_path

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


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
    (``local_files_only=True`` or ``HF_HUB_OFFLINE=1``) only the local cache is looked at.
    """

    def __init__(self, repo_id: str, options: LoadOptions) -> None:
        super().__init__(repo_id)
        from huggingface_hub import constants  # imported here: a local load needs no HTTP client

        self._options = options
        self._cache_dir = None if options.cache_dir is None else as_path(options.cache_dir)
        self._local = options.local_files_only or constants.is_offline_mode()
        self._commit: str | None = None
        self._snapshot: Path | None = None
        self._resolved = False
        self._forced: set[str] = set()

    @property
    def root(self) -> Path:
        if self._snapshot is None:
            raise SourceError(f"{self.name}: no file of this repository has been fetched yet")
        return self._snapshot

    def find(self, name: str) -> Path | None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        force = self._options.force_download and name not in self._forced and not self._local
        self._resolve()
        try:
            path = Path(
                hf_hub_download(
                    self.name,
                    name,
                    revision=self._commit or self._options.revision,
                    cache_dir=self._cache_dir,
                    token=self._options.token,
                    local_files_only=self._local,
                    force_download=force,
                )
            )
        except LocalEntryNotFoundError as error:
            if self._local:
                # Offline, a file that isn't cached may exist or not; only the first one tells whether the repository
                # is there at all.
                if self._snapshot is not None or self._cached_snapshot() is not None:
                    return None
                raise self._unreachable(error, "it isn't in the local cache and this load is offline") from error
            raise self._unreachable(error, "the Hub can't be reached") from error
        except EntryNotFoundError:
            return None
        except Exception as error:
            raise _explained(self, error) from error
        self._forced.add(name)
        self._pin(path, name)
        return path

    def fetch(self, names: Sequence[str]) -> dict[str, Path]:
        from concurrent.futures import ThreadPoolExecutor

        if len(names) < 2:
            return super().fetch(names)
        first = self.find(names[0])  # pins the commit before the others are asked for
        with ThreadPoolExecutor(max_workers=4) as pool:
            found = dict(zip(names, [first, *pool.map(self.find, names[1:])], strict=True))
        return {name: path for name, path in found.items() if path is not None}

    def listing(self) -> list[str]:
        if self._local:
            snapshot = self._snapshot or self._cached_snapshot()
            return [] if snapshot is None else sorted(entry.name for entry in snapshot.iterdir() if entry.is_file())
        from huggingface_hub import HfApi

        try:
            api = HfApi(token=self._options.token)
            return list(api.list_repo_files(self.name, revision=self._commit or self._options.revision))
        except Exception as error:
            raise _explained(self, error) from error

    def is_inside(self, path: Path) -> bool:
        # A snapshot's files are links into the same repository's blobs folder of the cache.
        repository = self.root.parent.parent.resolve()
        return path.resolve().is_relative_to(repository)

    @property
    def identity(self) -> dict[str, str]:
        return super().identity | ({"revision": self._commit} if self._commit else {})

    def _resolve(self) -> None:
        """Pin the revision to its commit, once, so that every file is of the same state of the repository.

        Mirrors also answer more precisely for a commit than for a branch: a file that isn't there is then told apart
        from a repository that isn't.
        """
        if self._resolved or self._local:
            return
        self._resolved = True
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        try:
            info = HfApi(token=self._options.token).model_info(self.name, revision=self._options.revision or "main")
        except (HfHubHTTPError, HFValidationError) as error:
            raise _explained(self, error) from error
        except Exception:  # noqa: BLE001 - no network, in the words of whichever HTTP client the Hub's library uses
            return  # what is cached can still be found, and find() says so when nothing is
        self._commit = info.sha

    def _pin(self, path: Path, name: str) -> None:
        snapshot = path.parents[len(Path(name).parts) - 1]
        if self._snapshot is None:
            self._snapshot, self._commit = snapshot, snapshot.name

    def _cached_snapshot(self) -> Path | None:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return Path(
                snapshot_download(
                    self.name,
                    revision=self._options.revision,
                    cache_dir=self._cache_dir,
                    local_files_only=True,
                )
            )
        except (LocalEntryNotFoundError, ValueError):
            return None

    def _unreachable(self, error: Exception, why: str) -> SourceError:
        return SourceError(
            f"{self.name!r} is neither a local path nor to be had from the Hub: {why}. If it is a folder, check the "
            f"spelling (looked at {Path(self.name).absolute()}). ({type(error).__name__})"
        )


def _explained(source: HubSource, error: Exception) -> Exception:
    """A ``SourceError`` for what the Hub said; anything that isn't the Hub's doing passes unchanged."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    reasons: list[tuple[type[Exception], str]] = [
        (GatedRepoError, "access to it is restricted; ask for access on its page and pass token="),
        (RepositoryNotFoundError, "there is no such repository, or it is private; check the spelling, or pass token="),
        (RevisionNotFoundError, f"it has no revision {source._options.revision!r}"),
        (HFValidationError, "it is neither an existing path nor a valid repository id (ORG/NAME)"),
        (HfHubHTTPError, "the Hub refused the request"),
        (OSError, "the Hub can't be reached"),
    ]
    for kind, reason in reasons:
        if isinstance(error, kind):
            return SourceError(f"{source.name!r}: {reason}. ({type(error).__name__}: {str(error).splitlines()[0]})")
    return error


def open_source(named: str | os.PathLike[str], options: LoadOptions) -> Source:
    """The source a user names: an existing folder or file, else a repository on the Hub.

    Raises:
        SourceError: it is a path that doesn't exist, or a file of no known kind.
    """
    path = as_path(named)
    name = os.fspath(named)
    if path.is_dir():
        return FolderSource(name, path)
    if path.is_file():
        if path.suffix not in _WEIGHT_SUFFIXES:
            raise SourceError(
                f"{path} is a file, but no weight file that is known by its suffix ({', '.join(_WEIGHT_SUFFIXES)}). "
                "Name the folder that it is in, or the weight file."
            )
        return FileSource(name, path)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or path.suffix in _WEIGHT_SUFFIXES:
        raise SourceError(f"{path.absolute()} doesn't exist. Name a folder, a weight file, or a Hub id (ORG/NAME).")
    return HubSource(name, options)
