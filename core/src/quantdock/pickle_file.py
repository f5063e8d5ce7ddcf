"""Weight files written by ``torch.save``, for users who ask for them: a zip archive with a pickle and raw storages.

A pickle is a program. It runs in torch's restricted unpickler (``weights_only=True``), which knows tensors and plain
containers and refuses everything else; nothing here ever unpickles in any other way.
"""

from __future__ import annotations

import pickle
import re
import struct
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch

from quantdock import pagecache
from quantdock.errors import CheckpointError
from quantdock.tensors import StoredTensor, TensorReader, TensorSpec

# What zipfile, torch's archive reader and its unpickler raise over damaged or hostile files, beside what is told apart.
_BROKEN = (
    RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError,
    NotImplementedError, EOFError, OSError, MemoryError, struct.error, zipfile.BadZipFile, pickle.UnpicklingError,
)  # fmt: skip


class PickleReader(TensorReader):
    """Views of a private map of the file, as torch makes them.

    The tensors are described while the reader is made; that runs the pickle and reads no values. A file with a tensor
    that isn't contiguous gives copies, and ``maps`` is false.

    Raises:
        CheckpointError: the file is of the old kind without an archive, damaged, asks for something that the restricted
            unpickler refuses, or holds anything but a dict of names to plain tensors.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._stamp = _stamp(file)
        tensors = _load(file, self._stamp[0])
        self._maps = all(tensor.is_contiguous() for tensor in tensors.values())
        self._tensors: dict[str, torch.Tensor] | None = tensors

    def tensors(self) -> Iterator[StoredTensor]:
        """Every tensor of the file, in the order of their values in it.

        Offsets count from the first value in the file, because torch doesn't tell where the map starts.
        """
        tensors = self._loaded()
        start = min((tensor.data_ptr() for tensor in tensors.values() if tensor.nbytes), default=0)
        offsets = {name: tensor.data_ptr() - start if tensor.nbytes else 0 for name, tensor in tensors.items()}
        for name in sorted(tensors, key=offsets.__getitem__):
            spec = TensorSpec.of(tensors[name])
            yield StoredTensor(
                name=name, spec=spec, file=self._file, offset=offsets[name], stored_nbytes=spec.nbytes, reader=self
            )

    @property
    def maps(self) -> bool:
        return self._maps

    def read(self, tensor: StoredTensor) -> torch.Tensor:
        """The values of ``tensor``, contiguous.

        Raises:
            CheckpointError: the reader was closed, and the file isn't the one any more that it described.
        """
        values = self._loaded()[tensor.name]
        return values.detach() if self._maps else values.clone(memory_format=torch.contiguous_format)

    def will_need(self, tensor: StoredTensor, start: int = 0, nbytes: int | None = None) -> None:
        if not start:  # its elements may be anywhere in the file, so slices of it are nothing to the kernel
            pagecache.read_ahead(self._loaded()[tensor.name])

    def close(self) -> None:
        """Let go of the map; it lasts as long as a tensor that was read from it. Reading again makes a new one."""
        with self._lock:
            self._tensors = None

    def _loaded(self) -> dict[str, torch.Tensor]:
        with self._lock:
            if self._tensors is None:
                if _stamp(self._file) != self._stamp:
                    raise CheckpointError("changed between being indexed and being read; load again", file=self._file)
                self._tensors = _load(self._file, self._stamp[0])
            return self._tensors


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(f"can't be read ({error.strerror})", file=path) from error
    return status.st_size, status.st_mtime_ns, status.st_ino


def _load(path: Path, size: int) -> dict[str, torch.Tensor]:
    """Run the pickle, restricted, over a map of the file."""
    _check_archive(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except _BROKEN as error:
        refused = re.search(r"\bGLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if refused:
            raise CheckpointError(
                f"the pickle asks for {refused[1]!r}, which is neither a tensor nor a plain container. quantdock never "
                "executes pickles. If you trust the file's author, save its tensors alone as safetensors",
                file=path,
            ) from error
        raise CheckpointError(f"not readable as a torch checkpoint ({_gist(error)})", file=path) from error
    if not isinstance(found, dict):
        raise CheckpointError(f"holds a {_kind(found)}, expected a dict of names to tensors", file=path)
    return {_checked_name(name, path): _checked_tensor(name, value, path, size) for name, value in found.items()}


def _check_archive(path: Path) -> None:
    """Raise for what torch would take for something else, or read without noticing.

    Mapping a compressed record, which repacking tools write and ``torch.save`` never does, gives the compressed bytes.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except zipfile.BadZipFile as error:
        raise CheckpointError(_not_an_archive(path), file=path) from error
    except _BROKEN as error:
        raise CheckpointError(f"not readable as a zip archive ({_gist(error)})", file=path) from error
    if any(record.filename.endswith("/constants.pkl") for record in records):
        raise CheckpointError("a TorchScript program, expected a dict of names to tensors", file=path)
    for record in records:
        if record.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(
                f"{record.filename} is compressed in the archive, so it can't be mapped; save it with torch.save",
                file=path,
            )


def _not_an_archive(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(16)
    if head.startswith(b"PK"):
        return "the end of the zip archive is missing or damaged; download it again"
    if head.startswith(b"version "):
        return "a Git LFS pointer instead of the file itself; run `git lfs pull`"
    if head.startswith(b"\x80"):
        return (
            "a pickle as torch.save wrote them before version 1.6, which can't be mapped; convert it: "
            f'torch.save(torch.load({path.name!r}, weights_only=True), "converted.bin")'
        )
    return f"starts with {head!r}, expected a zip archive as torch.save writes them"


def _checked_name(name: object, path: Path) -> str:
    if not isinstance(name, str):
        raise CheckpointError(f"a key of its dict is {name!r:.200}, expected the name of a tensor", file=path)
    return name


def _checked_tensor(name: str, value: object, path: Path, size: int) -> torch.Tensor:
    """A plain tensor over the file's own bytes, not more than the file has."""
    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        raise CheckpointError(
            f"is a {_kind(value)}, expected a tensor: the file isn't a plain state dict", file=path, tensor=name
        )
    assert isinstance(value, torch.Tensor), "just checked"
    tensor = value.detach()
    plain = tensor.layout == torch.strided and not tensor.is_quantized and tensor.device.type == "cpu"
    if not plain or tensor.is_conj() or tensor.is_neg():
        raise CheckpointError(
            f"a {tensor.layout} tensor of {tensor.dtype} on {tensor.device}, expected plain values",
            file=path,
            tensor=name,
        )
    if tensor.nbytes > size:
        raise CheckpointError(
            f"expands to {tensor.nbytes:,} bytes, more than the whole file has ({size:,})", file=path, tensor=name
        )
    if tensor.nbytes and tensor.data_ptr() % tensor.itemsize:
        raise CheckpointError(
            "misaligned in the archive, so it can't be mapped; save it with torch.save", file=path, tensor=name
        )
    return tensor


def _kind(value: object) -> str:
    if isinstance(value, dict):
        return f"dict with {', '.join(map(repr, list(value)[:4]))}"
    return type(value).__name__


def _gist(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]:.300}" if lines else type(error).__name__
