"""Loading from a Hub: a real server, the self-hosted mirror that companies run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import TinyFactory
from tests.hub_server import HubServer

import quantdock

pytestmark = pytest.mark.hub

NORM = "model.norm.weight"


@pytest.fixture
def hub(hub_server: HubServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The server, and this process's huggingface_hub pointed at it."""
    from huggingface_hub import close_session, constants

    monkeypatch.setattr(constants, "ENDPOINT", hub_server.endpoint)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.split("{repo_id}")[1]
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub_server.endpoint + "/{repo_id}" + template)
    yield hub_server
    close_session()


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on any request would fail at once."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}")


def scaled(folder: Path, target: Path, factor: float) -> Path:
    """A copy whose final norm is multiplied."""
    shutil.copytree(folder, target)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {NORM: tensors[NORM] * factor}, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_only_what_is_needed_is_downloaded(hub: HubServer, tiny_copy: TinyFactory, tmp_path: Path) -> None:
    folder = tiny_copy("llama")
    (folder / "pytorch_model.bin").write_bytes(b"x" * 1_000_000)
    (folder / "README.md").write_text("not needed")
    commit = hub.add_model("source/needed", folder)
    cache = tmp_path / "cache"
    model = quantdock.load("source/needed", cache_dir=cache)
    expected = load_file(folder / "model.safetensors")
    assert torch.equal(model.state_dict()[NORM], expected[NORM])
    snapshot = next(cache.glob("models--source--needed/snapshots/*"))
    assert {path.name for path in snapshot.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    assert quantdock.report(model).source == {"kind": "hub", "name": "source/needed", "revision": commit}


def test_a_revision_stays_what_it_was(hub: HubServer, tiny: TinyFactory, tmp_path: Path) -> None:
    old = hub.add_model("source/revised", tiny("llama"))
    hub.add_model("source/revised", scaled(tiny("llama"), tmp_path / "new", 2.0))
    cache = tmp_path / "cache"
    before = quantdock.load("source/revised", revision=old, cache_dir=cache).state_dict()[NORM]
    after = quantdock.load("source/revised", cache_dir=cache).state_dict()[NORM]
    assert torch.equal(before * 2, after)


@pytest.mark.usefixtures("hub")
def test_a_repository_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(quantdock.SourceError, match="source/nowhere"):
        quantdock.load("source/nowhere", cache_dir=tmp_path)


def test_cached_it_loads_without_a_request(
    hub: HubServer, tiny: TinyFactory, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    hub.add_model("source/cached", tiny("llama"))
    first = quantdock.load("source/cached", cache_dir=tmp_path)
    request.getfixturevalue("unreachable")
    second = quantdock.load("source/cached", cache_dir=tmp_path, local_files_only=True)
    assert torch.equal(first.state_dict()[NORM], second.state_dict()[NORM])
    with pytest.raises(quantdock.SourceError, match="offline"):
        quantdock.load("source/other", cache_dir=tmp_path, local_files_only=True)


@pytest.mark.usefixtures("unreachable")
def test_offline_a_path_that_does_not_exist_is_explained(tmp_path: Path) -> None:
    with pytest.raises(quantdock.SourceError, match="there is none at"):
        quantdock.load("no/such", cache_dir=tmp_path, local_files_only=True)


def test_shards_and_variants(hub: HubServer, tiny_copy: TinyFactory, tmp_path: Path) -> None:
    folder = tiny_copy("llama")
    tensors = load_file(folder / "model.safetensors")
    halves = {name: tensor.half() for name, tensor in tensors.items()}
    weight_map = {}
    for index, name in enumerate(halves):
        weight_map[name] = f"model.fp16-{index % 3 + 1:05d}-of-00003.safetensors"
    for file in sorted(set(weight_map.values())):
        members = {name: halves[name] for name, home in weight_map.items() if home == file}
        save_file(members, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.fp16.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    hub.add_model("source/variants", folder)
    cache = tmp_path / "cache"
    model = quantdock.load("source/variants", variant="fp16", dtype="float16", cache_dir=cache)
    assert torch.equal(model.state_dict()[NORM], halves[NORM])
    snapshot = next(cache.glob("models--source--variants/snapshots/*"))
    assert not (snapshot / "model.safetensors").exists()
