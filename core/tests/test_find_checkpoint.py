"""Which files of a source are its checkpoint, and that a hostile or incomplete index never gets through."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from quantdock.checkpoint import Checkpoint
from quantdock.errors import CheckpointError
from quantdock.find_checkpoint import find_checkpoint

INDEX = "model.safetensors.index.json"


class Folder:
    """A source as ``find_checkpoint`` needs it: a folder, or one file."""

    name = "the-source"

    def __init__(self, root: Path, single_file: Path | None = None) -> None:
        self._root = root
        self._single_file = single_file
        self.asked: list[str] = []

    @property
    def single_file(self) -> Path | None:
        return self._single_file

    def find(self, name: str) -> Path | None:
        self.asked.append(name)
        path = self._root / name
        return path if path.is_file() else None

    def fetch(self, names: Sequence[str]) -> dict[str, Path]:
        return {name: path for name in names if (path := self.find(name)) is not None}

    def is_inside(self, path: Path) -> bool:
        return path.resolve().is_relative_to(self._root.resolve())

    def listing(self) -> list[str]:
        return sorted(path.name for path in self._root.iterdir() if path.is_file())


def find(root: Path, *, variant: str | None = None, use_safetensors: bool = True) -> Checkpoint:
    return find_checkpoint(Folder(root), variant=variant, use_safetensors=use_safetensors)


def write_index(root: Path, weight_map: Any, name: str = INDEX) -> None:
    (root / name).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))


def write_shards(root: Path, shards: Mapping[str, Sequence[str]], index: str = INDEX) -> None:
    """Files with one-element tensors that hold their own length of name, and a right index of them."""
    for shard, names in shards.items():
        tensors = {name: torch.tensor([len(name)]) for name in names}
        if shard.endswith(".safetensors"):
            save_file(tensors, root / shard, metadata={"format": "pt", "shard": shard})
        else:
            torch.save(tensors, root / shard)
    write_index(root, {name: shard for shard, names in shards.items() for name in names}, index)


def value(checkpoint: Checkpoint, name: str) -> int:
    return int(checkpoint.tensors[name].read())


# --- what is found


def test_a_single_file(tmp_path: Path) -> None:
    save_file({"b": torch.ones(2), "a": torch.zeros(3)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = find(tmp_path)
    assert (found.format, found.files) == ("safetensors", (tmp_path / "model.safetensors",))
    offsets = [tensor.offset for tensor in found.tensors.values()]
    assert offsets == sorted(offsets)
    assert found.metadata == {"format": "pt"}
    assert found.stored_nbytes == 20
    assert found.tensors["b"].read().tolist() == [1, 1]
    found.close()


def test_shards_in_the_order_of_their_names(tmp_path: Path) -> None:
    write_shards(tmp_path, {"z.safetensors": ["first", "x"], "a.safetensors": ["second"], "m.safetensors": ["third"]})
    found = find(tmp_path)
    assert [path.name for path in found.files] == ["a.safetensors", "m.safetensors", "z.safetensors"]
    assert list(found.tensors)[:2] == ["second", "third"]
    assert [tensor.file.name for tensor in found.tensors.values()] == ["a.safetensors", "m.safetensors"] + [
        "z.safetensors"
    ] * 2
    assert found.metadata == {"format": "pt", "shard": "a.safetensors"}
    assert all(value(found, name) == len(name) for name in found.tensors)


def test_shards_in_a_folder_below(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    write_shards(tmp_path, {"weights/a.safetensors": ["x"]})
    assert value(find(tmp_path), "x") == 1


def test_a_single_file_is_preferred_and_nothing_else_is_fetched(tmp_path: Path) -> None:
    write_shards(tmp_path, {"a.safetensors": ["sharded"]})
    save_file({"single": torch.ones(1)}, tmp_path / "model.safetensors")
    torch.save({"pickled": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    source = Folder(tmp_path)
    assert list(find_checkpoint(source, variant=None, use_safetensors=True).tensors) == ["single"]
    assert source.asked == ["model.safetensors"]


def test_variants(tmp_path: Path) -> None:
    save_file({"plain": torch.ones(1)}, tmp_path / "model.safetensors")
    save_file({"half": torch.ones(1)}, tmp_path / "model.fp16.safetensors")
    write_shards(tmp_path, {"model.q-00001-of-00001.safetensors": ["q"]}, "model.safetensors.index.q.json")
    torch.save({"pickled": torch.ones(1)}, tmp_path / "pytorch_model.fp16.bin")
    write_shards(tmp_path, {"a.bin": ["r"]}, "pytorch_model.bin.index.r.json")
    assert list(find(tmp_path).tensors) == ["plain"]
    assert list(find(tmp_path, variant="fp16").tensors) == ["half"]
    assert list(find(tmp_path, variant="q").tensors) == ["q"]
    assert list(find(tmp_path, variant="fp16", use_safetensors=False).tensors) == ["pickled"]
    assert list(find(tmp_path, variant="r", use_safetensors=False).tensors) == ["r"]


def test_pickles_on_request(tmp_path: Path) -> None:
    write_shards(
        tmp_path, {"pytorch_model-2.bin": ["b"], "pytorch_model-1.bin": ["aa"]}, "pytorch_model.bin.index.json"
    )
    save_file({"safe": torch.ones(1)}, tmp_path / "model.safetensors")
    found = find(tmp_path, use_safetensors=False)
    assert found.format == "pickle"
    assert list(found.tensors) == ["aa", "b"]
    assert value(found, "aa") == 2
    torch.save({"single": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert list(find(tmp_path, use_safetensors=False).tensors) == ["single"]


@pytest.mark.parametrize(
    ("name", "use_safetensors"), [("any.safetensors", True), ("any.safetensors", False), ("any.bin", False)]
)
def test_a_file_that_was_named(tmp_path: Path, name: str, use_safetensors: bool) -> None:
    path = tmp_path / name
    write = save_file if path.suffix == ".safetensors" else torch.save
    write({"x": torch.ones(1)}, path)
    found = find_checkpoint(Folder(tmp_path, path), variant=None, use_safetensors=use_safetensors)
    assert found.files == (path,)
    assert value(found, "x") == 1


def test_many_shards_stay_few_objects(tmp_path: Path) -> None:
    """One reader per file, and tensors that know no more than they must."""
    write_shards(
        tmp_path, {f"{shard:02}.safetensors": [f"{shard}.{item}" for item in range(20)] for shard in range(30)}
    )
    found = find(tmp_path)
    assert len(found.tensors) == 600
    assert len({id(tensor.reader) for tensor in found.tensors.values()}) == 30


# --- what isn't


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth"])
def test_a_pickle_that_was_named_has_to_be_asked_for(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    torch.save({"x": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match=r"is a pickle; .*use_safetensors=False"):
        find_checkpoint(Folder(tmp_path, path), variant=None, use_safetensors=True)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"reads files ending in '\.h5'.* reads \.safetensors, \.bin"):
        find_checkpoint(Folder(tmp_path, tmp_path / "x.h5"), variant=None, use_safetensors=True)
    with pytest.raises(CheckpointError, match="variant='fp16' chooses among a folder's files"):
        find_checkpoint(Folder(tmp_path, tmp_path / "x.safetensors"), variant="fp16", use_safetensors=True)


@pytest.mark.parametrize(
    ("present", "variant", "use_safetensors", "message"),
    [
        ([], None, True, r"the-source: has neither model\.safetensors nor model\.safetensors\.index\.json$"),
        ([], None, False, r"has neither pytorch_model\.bin nor pytorch_model\.bin\.index\.json$"),
        ([], "x", True, r"has neither model\.x\.safetensors nor model\.safetensors\.index\.x\.json$"),
        (["pytorch_model.bin"], None, True, r"it has pytorch_model\.bin; pickles can carry .*use_safetensors=False"),
        (["pytorch_model.bin.index.json"], None, True, r"it has pytorch_model\.bin\.index\.json; pickles can carry"),
        (["model.safetensors"], None, False, r"it has model\.safetensors; leave use_safetensors at True"),
        (["model.safetensors"], "fp16", True, "it can be loaded with no variant$"),
        (
            ["model.a.safetensors", "model.safetensors.index.b.json", "model.b-00001-of-00002.safetensors"],
            "fp16",
            True,
            "it can be loaded with variant='a' or variant='b'$",
        ),
        (["model.a.safetensors"], None, True, "it can be loaded with variant='a'$"),
        (["other.safetensors"], None, True, r"it has other\.safetensors; to load one of them, name its local path$"),
    ],
)
def test_nothing_found_says_what_there_is_and_how_to_get_it(
    tmp_path: Path, present: list[str], variant: str | None, use_safetensors: bool, message: str
) -> None:
    for name in present:
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=message):
        find(tmp_path, variant=variant, use_safetensors=use_safetensors)


@pytest.mark.parametrize("variant", ["../x", "a/b", "", "a..b", "a\0b", "a\\b"])
def test_a_variant_is_part_of_a_file_name(tmp_path: Path, variant: str) -> None:
    source = Folder(tmp_path)
    with pytest.raises(CheckpointError, match="can't be part of a file name"):
        find_checkpoint(source, variant=variant, use_safetensors=True)
    assert not source.asked


@pytest.mark.parametrize(
    "shard",
    [
        "../outside.safetensors",
        "sub/../../outside.safetensors",
        "..",
        "./model-1.safetensors",
        "a//b.safetensors",
        "/etc/passwd.safetensors",
        "..\\outside.safetensors",
        "\\\\host\\share\\x.safetensors",
        "C:\\x.safetensors",
        "C:x.safetensors",
        "file:x.safetensors",
        "a\0.safetensors",
        "a\n.safetensors",
        "\ud800.safetensors",
        "",
        "sub/",
    ],
)
def test_a_shard_is_a_plain_path_inside_the_source(tmp_path: Path, shard: str) -> None:
    inside = tmp_path / "source"
    inside.mkdir()
    save_file({"x": torch.ones(1)}, tmp_path / "outside.safetensors")
    write_index(inside, {"x": shard})
    source = Folder(inside)
    with pytest.raises(CheckpointError, match="expected a plain path inside the source"):
        find_checkpoint(source, variant=None, use_safetensors=True)
    assert source.asked == ["model.safetensors", INDEX]


@pytest.mark.parametrize("shard", ["x.bin", "x.py", "x", "x.safetensors.exe"])
def test_a_shard_has_the_suffix_of_its_format(tmp_path: Path, shard: str) -> None:
    torch.save({"x": torch.ones(1)}, tmp_path / shard)
    write_index(tmp_path, {"x": shard})
    with pytest.raises(CheckpointError, match=r"expected it to end in \.safetensors"):
        find(tmp_path)


@pytest.mark.parametrize("linked", ["shard.safetensors", "model.safetensors", INDEX])
def test_a_link_out_of_the_source_is_refused(tmp_path: Path, linked: str) -> None:
    inside, outside = tmp_path / "source", tmp_path / "elsewhere"
    inside.mkdir()
    outside.mkdir()
    write_shards(outside, {"shard.safetensors": ["x"]})
    save_file({"x": torch.ones(1)}, outside / "model.safetensors")
    if linked == "shard.safetensors":
        write_index(inside, {"x": linked})
    (inside / linked).symlink_to(outside / linked)
    with pytest.raises(CheckpointError, match="links lead out of it: ") as caught:
        find(inside)
    assert f"{linked} ({outside / linked})" in str(caught.value)


def test_a_link_inside_the_source_is_followed(tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    save_file({"x": torch.ones(1)}, blobs / "0123")
    (tmp_path / "shard.safetensors").symlink_to(blobs / "0123")
    write_index(tmp_path, {"x": "shard.safetensors"})
    assert value(find(tmp_path), "x") == 1


def test_missing_shards_are_named_all_at_once(tmp_path: Path) -> None:
    write_shards(tmp_path, {f"{number}.safetensors": [f"t{number}"] for number in range(4)})
    (tmp_path / "1.safetensors").unlink()
    (tmp_path / "3.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"2 of 4 files it names are missing: 1\.safetensors, 3\.safetensors;"):
        find(tmp_path)


def test_index_and_files_have_to_agree(tmp_path: Path) -> None:
    write_shards(tmp_path, {"1.safetensors": ["a", "b", "extra"], "2.safetensors": ["c", "d"]})
    write_index(
        tmp_path,
        {"a": "1.safetensors", "b": "2.safetensors", "c": "2.safetensors", "d": "2.safetensors", "e": "1.safetensors"},
    )
    with pytest.raises(CheckpointError, match="doesn't agree with the files it names") as caught:
        find(tmp_path)
    assert caught.value.file == tmp_path / INDEX
    for problem in (
        "'e' isn't in 1.safetensors",
        "'b' isn't in 2.safetensors",
        "'b' is in 1.safetensors, but should be in 2.safetensors",
        "'extra' is in 1.safetensors, but isn't named",
    ):
        assert problem in str(caught.value)
    assert "'a'" not in str(caught.value)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path, {"1.safetensors": ["a", "b"], "2.safetensors": ["b", "c"]})
    with pytest.raises(CheckpointError, match=r"'b' is in 1\.safetensors, but should be in 2\.safetensors"):
        find(tmp_path)


def test_many_problems_are_counted(tmp_path: Path) -> None:
    write_shards(tmp_path, {"1.safetensors": ["a"]})
    write_index(tmp_path, {f"t{number:03}": "1.safetensors" for number in range(100)} | {"a": "1.safetensors"})
    with pytest.raises(CheckpointError, match=r"'t019' isn't in 1\.safetensors and 80 more$"):
        find(tmp_path)


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path, {"1.safetensors": ["a"], "2.safetensors": ["b"]})
    with (tmp_path / "2.safetensors").open("r+b") as file:
        file.truncate((tmp_path / "2.safetensors").stat().st_size - 1)
    with pytest.raises(CheckpointError, match=r"1 of \S+ bytes are missing") as caught:
        find(tmp_path)
    assert caught.value.file == tmp_path / "2.safetensors"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not usable JSON"),
        ("{", "not usable JSON"),
        ("\xff", "not usable JSON"),
        ("[" * 10**6, "nested too deeply"),
        ("[]", "has no weight_map"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": ["x.safetensors"]}', "has no weight_map"),
        ('{"weight_map": {"w": ["x.safetensors"]}}', r"tensor 'w': is in \['x\.safetensors'\], expected the name"),
        ('{"weight_map": {"w": null}}', "tensor 'w': is in None, expected the name"),
        ('{"weight_map": {"w": "x.safetensors", "w": "y.safetensors"}}', "'w' comes more than once"),
        ('{"weight_map": {"w": "x.safetensors"}, "weight_map": {}}', "'weight_map' comes more than once"),
    ],
)
def test_a_broken_index_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / INDEX).write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=message) as caught:
        find(tmp_path)
    assert caught.value.file == tmp_path / INDEX


def test_a_huge_index_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / INDEX).open("wb") as file:
        file.truncate(10**9)
    with pytest.raises(CheckpointError, match="an index of 1,000,000,000 bytes"):
        find(tmp_path)
