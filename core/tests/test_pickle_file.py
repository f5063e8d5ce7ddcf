"""Files of ``torch.save``: plain tensors are read through a map, and nothing in a pickle is ever executed."""

from __future__ import annotations

import gc
import json
import os
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from quantdock import pagecache
from quantdock.errors import CheckpointError
from quantdock.pickle_file import PickleReader
from quantdock.tensors import StoredTensor


def saved(folder: Path, value: Any, **options: Any) -> Path:
    path = folder / "pytorch_model.bin"
    torch.save(value, path, **options)
    return path


def index(path: Path) -> dict[str, StoredTensor]:
    return {tensor.name: tensor for tensor in PickleReader(path).tensors()}


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    embedding = torch.arange(600.0).view(20, 30)
    return {
        "head": embedding,
        "embedding": embedding,
        "half": torch.randn(300).to(torch.bfloat16),
        "float8": torch.randn(40).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(5),
        "none": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(3)),
    }


def test_tensors_are_views_of_a_map(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    path = saved(tmp_path, state)
    before = path.read_bytes()
    stored = index(path)
    assert stored.keys() == state.keys()
    assert stored["half"].reader.maps
    for name, expected in state.items():
        tensor = stored[name].read()
        assert stored[name].spec.dtype == tensor.dtype == expected.dtype
        assert stored[name].spec.shape == tensor.shape == expected.shape
        assert torch.equal(tensor.float(), expected.float())
        assert not tensor.requires_grad
    view = stored["half"].read()
    assert view.data_ptr() == stored["half"].read().data_ptr()
    view.fill_(1)
    stored["half"].reader.close()
    del view
    assert path.read_bytes() == before
    assert torch.equal(stored["half"].read(), state["half"])


def test_tensors_come_in_file_order_and_tied_ones_share_their_values(
    tmp_path: Path, state: dict[str, torch.Tensor]
) -> None:
    path = saved(tmp_path, state)
    stored = index(path)
    assert stored["head"].offset == stored["embedding"].offset
    assert stored["head"].read().data_ptr() == stored["embedding"].read().data_ptr()
    offsets = [tensor.offset for tensor in stored.values()]
    assert offsets == sorted(offsets)
    data = path.read_bytes()
    first = data.index(bytes(state["head"].flatten().view(torch.uint8).tolist()))
    for name in ("half", "scalar"):  # offsets count from the first value
        values = state[name].reshape(-1).view(torch.uint8)
        offset = stored[name].offset - stored["head"].offset
        assert data[first + offset :][: stored[name].stored_nbytes] == bytes(values.tolist())


def test_tensors_outlive_the_reader_and_the_file(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    path = saved(tmp_path, state)
    stored = index(path)
    tensor = stored["head"].read()
    stored["head"].reader.close()
    path.unlink()
    gc.collect()
    assert torch.equal(tensor, state["head"])
    with pytest.raises(CheckpointError, match="can't be read"):
        stored["half"].read()


def test_a_file_that_changed_since_it_was_indexed_is_refused(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    path = saved(tmp_path, state)
    stored = index(path)
    stored["head"].reader.close()
    path.unlink()
    saved(tmp_path, {"head": torch.ones(1)})
    with pytest.raises(CheckpointError, match="changed between being indexed and being read"):
        stored["head"].read()


def test_a_file_with_a_transposed_tensor_gives_contiguous_copies(tmp_path: Path) -> None:
    values = torch.arange(6.0).view(2, 3)
    stored = index(saved(tmp_path, {"t": values.t(), "w": values}))
    assert not stored["t"].reader.maps
    for name, expected in (("t", values.t()), ("w", values)):
        tensor = stored[name].read()
        assert tensor.is_contiguous()
        assert torch.equal(tensor, expected)
        assert tensor.data_ptr() != stored[name].read().data_ptr()


def test_pages_can_be_released_and_read_ahead(tmp_path: Path) -> None:
    values = torch.arange(100_000)
    tensor = index(saved(tmp_path, {"w": values}))["w"]
    tensor.reader.will_need(tensor)
    view = tensor.read()
    assert torch.equal(view, values)
    pagecache.release(view)
    assert torch.equal(view, values)


# --- hostile files


class MakeFolder:
    """Pickles as a call that makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


class RunCommand(MakeFolder):
    """Pickles as a shell command."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f'"{sys.executable}" -c "import os; os.mkdir({str(self.path)!r})"',)


@pytest.mark.parametrize(("kind", "named"), [(MakeFolder, "mkdir"), (RunCommand, "system")])
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_not_run(tmp_path: Path, kind: type[MakeFolder], named: str, zipped: bool) -> None:
    victim = tmp_path / "made"
    hostile = {"w": torch.ones(2), "x": kind(victim)}
    pickle.loads(pickle.dumps(hostile["x"]))
    assert victim.exists()  # the pickle is as bad as it looks
    victim.rmdir()
    path = saved(tmp_path, hostile, _use_new_zipfile_serialization=zipped)
    refusal = f"asks for '.*{named}.*quantdock never executes pickles" if zipped else "before version 1.6"
    with pytest.raises(CheckpointError, match=refusal):
        PickleReader(path)
    assert not victim.exists()


def test_a_class_is_refused_by_name(tmp_path: Path) -> None:
    path = saved(tmp_path, {"layer": torch.nn.Linear(2, 2)})
    with pytest.raises(CheckpointError, match=r"asks for 'torch\.nn\.modules\.linear\.Linear'") as caught:
        PickleReader(path)
    assert caught.value.file == path


def test_the_old_format_says_how_to_convert(tmp_path: Path) -> None:
    path = saved(tmp_path, {"w": torch.arange(3)}, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"torch\.save\(torch\.load") as caught:
        PickleReader(path)
    command = str(caught.value).rpartition("convert it: ")[2]
    converted = command.replace("'pytorch_model.bin'", repr(str(path)))
    converted = converted.replace('"converted.bin"', repr(str(tmp_path / "converted.bin")))
    exec(converted, {"torch": torch})
    assert index(tmp_path / "converted.bin")["w"].read().tolist() == [0, 1, 2]


@pytest.mark.parametrize("left", [0.99, 0.5, 0.1])
def test_a_truncated_archive_is_refused(tmp_path: Path, state: dict[str, torch.Tensor], left: float) -> None:
    path = saved(tmp_path, state)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * left)])
    with pytest.raises(CheckpointError, match="the end of the zip archive is missing or damaged"):
        PickleReader(path)


def test_a_compressed_archive_is_refused(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    path = saved(tmp_path, state)
    packed = tmp_path / "packed.bin"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for record in source.infolist():
            target.writestr(record.filename, source.read(record))
    with pytest.raises(CheckpointError, match="is compressed in the archive"):
        PickleReader(packed)


def test_a_repacked_archive_is_refused_or_right(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    """Other tools don't align the records; every shift of them is tried."""
    path = saved(tmp_path, state)
    refusals = []
    for shift in range(4):
        packed = tmp_path / f"packed{shift}.bin"
        with zipfile.ZipFile(path) as source, zipfile.ZipFile(packed, "w") as target:
            for record in source.infolist():
                target.writestr(record.filename, source.read(record))
                if record.filename.endswith("data.pkl"):
                    target.writestr("pytorch_model/padding", b" " * shift)
        try:
            stored = index(packed)
        except CheckpointError as error:
            refusals.append(str(error))
        else:
            assert all(torch.equal(stored[name].read().float(), state[name].float()) for name in state)
    assert refusals
    assert all("misaligned in the archive" in refusal for refusal in refusals)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([torch.ones(2)], "holds a list, expected a dict"),
        (torch.ones(2), "holds a Tensor, expected a dict"),
        ({"state_dict": {"w": torch.ones(2)}}, r"tensor 'state_dict': is a dict with 'w', expected a tensor"),
        ({"w": torch.ones(2), "epoch": 3}, "tensor 'epoch': is a int, expected a tensor"),
        ({0: torch.ones(2)}, "a key of its dict is 0, expected the name of a tensor"),
        ({"w": torch.ones(4, 4).to_sparse()}, r"tensor 'w': a torch\.sparse_coo tensor"),
        ({"w": torch.ones(3, device="meta")}, r"tensor 'w': .* on meta, expected plain values"),
        ({"w": torch.ones(3, dtype=torch.complex64).conj()}, "tensor 'w': .* expected plain values"),
        ({"w": torch.ones(1).expand(2**40)}, "tensor 'w': expands to 4,398,046,511,104 bytes"),
    ],
)
def test_anything_but_a_dict_of_plain_tensors_is_refused(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        PickleReader(saved(tmp_path, value))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "starts with b''"),
        (json.dumps({"w": [1, 2]}).encode(), "expected a zip archive as torch.save writes them"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (pickle.dumps({"w": 1}), "before version 1.6"),
    ],
)
def test_what_is_no_torch_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        PickleReader(path)


def test_a_zip_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes/data.txt", "hello")
    with pytest.raises(CheckpointError, match="not readable as a torch checkpoint"):
        PickleReader(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("program/constants.pkl", "")
    with pytest.raises(CheckpointError, match="a TorchScript program"):
        PickleReader(path)
    with pytest.raises(CheckpointError, match="can't be read"):
        PickleReader(tmp_path / "absent.bin")
    with pytest.raises(CheckpointError, match="not readable as a zip archive"):
        PickleReader(tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, about what the damage looks like
def test_damage_anywhere_is_refused_or_only_in_values(tmp_path: Path) -> None:
    """Bytes from start to end in turn; the archive has checksums, but nobody reads all values for their sake."""
    path = saved(tmp_path, {"w": torch.arange(4.0), "v": torch.ones(2, dtype=torch.int16)})
    good = path.read_bytes()
    outcomes = set()
    for position in range(0, len(good), 3):
        path.unlink()
        path.write_bytes(good[:position] + bytes([good[position] ^ 0x11]) + good[position + 1 :])
        try:
            stored = index(path)
        except CheckpointError:
            outcomes.add("refused")
        else:
            for tensor in stored.values():
                assert tensor.read().shape == tensor.spec.shape
            outcomes.add("read")
    assert outcomes == {"refused", "read"}
