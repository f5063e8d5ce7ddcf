"""Damaged or hostile input is refused with an error that names the cause; nothing is loaded.

``LOADED_BY_TRANSFORMERS`` notes which of these transformers 5.23 loads without an exception.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import importlib_metadata
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.conftest import TinyFactory

import quantdock

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def single(tiny_copy: TinyFactory) -> Path:
    """A checkpoint of one file, untied."""
    folder = tiny_copy("llama")
    assert (folder / WEIGHTS).is_file()
    return folder


@pytest.fixture
def sharded(single: Path) -> Path:
    """The same in two shards with an index."""
    tensors = load_file(single / WEIGHTS)
    (single / WEIGHTS).unlink()
    names = list(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    weight_map = {}
    for file, members in shards.items():
        save_file({name: tensors[name] for name in members}, single / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(members, file))
    (single / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return single


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def rewrite_header(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    raw = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    body = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(body)) + body + raw[8 + length :])


def rewrite_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refuses(
    folder: Path, *mentions: str, error: type[quantdock.QuantdockError] = quantdock.QuantdockError, **options: Any
) -> quantdock.QuantdockError:
    """Planning raises a quantdock error that mentions every one of ``mentions``; so does loading."""
    with pytest.raises(error) as caught:
        quantdock.load(folder, **options)
    for mention in mentions:
        assert mention in str(caught.value), f"{mention!r} is not in: {caught.value}"
    return caught.value


NORM = "model.layers.1.input_layernorm.weight"
UP = "model.layers.0.mlp.up_proj.weight"


class TestLedger:
    def test_a_missing_tensor(self, single: Path) -> None:
        rewrite(single, lambda tensors: tensors.pop(UP))
        refuses(single, UP, "allow_missing", error=quantdock.LedgerError)

    def test_every_problem_is_listed_at_once(self, single: Path) -> None:
        def damage(tensors: dict[str, torch.Tensor]) -> None:
            del tensors[UP]
            tensors[NORM] = torch.ones(3)
            tensors["model.layers.7.stray.weight"] = torch.ones(2)

        rewrite(single, damage)
        error = refuses(single, UP, NORM, "model.layers.7.stray.weight", error=quantdock.LedgerError)
        assert isinstance(error, quantdock.LedgerError)
        assert len(error.problems) == 3

    def test_a_wrong_shape(self, single: Path) -> None:
        rewrite(single, lambda tensors: tensors.update({UP: torch.zeros(4, 4)}))
        refuses(single, UP, "[4, 4]", WEIGHTS, "ignore_mismatched_sizes", error=quantdock.LedgerError)

    def test_an_unexpected_scale(self, single: Path) -> None:
        name = UP.replace(".weight", ".weight_scale_inv")
        rewrite(single, lambda tensors: tensors.update({name: torch.ones(1)}))
        refuses(single, name, "ignore_unexpected", error=quantdock.LedgerError)

    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8])
    def test_a_quantized_tensor_that_lost_its_scale(self, single: Path, dtype: torch.dtype) -> None:
        rewrite(single, lambda tensors: tensors.update({UP: tensors[UP].to(dtype)}))
        refuses(single, UP, str(dtype).removeprefix("torch."), "scale", error=quantdock.LedgerError)

    def test_opt_ins_let_through_and_are_reported(self, single: Path) -> None:
        def damage(tensors: dict[str, torch.Tensor]) -> None:
            del tensors[UP]
            tensors[NORM] = torch.ones(3)
            tensors["stray.weight"] = torch.ones(2)

        rewrite(single, damage)
        model = quantdock.load(single, allow_missing=[UP], ignore_unexpected=["stray.*"], ignore_mismatched_sizes=True)
        report = quantdock.report(model)
        assert report.ledger.allowed.keys() == {UP, NORM, "stray.weight"}
        assert report.ledger.ignored.keys() == {NORM, "stray.weight"}
        state = model.state_dict()
        assert torch.equal(state[NORM], torch.ones_like(state[NORM])), "a norm's own rule is ones"
        assert 0 < state[UP].float().std() < 1, "a projection's own rule is a normal distribution"

    @pytest.mark.parametrize("option", ["skip", "allow_missing", "ignore_unexpected"])
    def test_a_pattern_that_matches_nothing(self, single: Path, option: str) -> None:
        refuses(single, option, "no.such.module", error=quantdock.PatternError, **{option: ["no.such.module"]})

    def test_a_pattern_must_be_in_a_list(self, single: Path) -> None:
        refuses(single, "skip", "lm_head", error=quantdock.ConfigError, skip="lm_head")


class TestFiles:
    def test_a_tensor_that_the_index_names_but_no_file_has(self, sharded: Path) -> None:
        rewrite_index(sharded, lambda names: names.update({"ghost.weight": "model-00001-of-00002.safetensors"}))
        refuses(sharded, "ghost.weight", "model-00001-of-00002.safetensors", error=quantdock.CheckpointError)

    def test_a_tensor_that_only_a_file_has(self, sharded: Path) -> None:
        rewrite_index(sharded, lambda names: names.pop(UP))
        refuses(sharded, UP, error=quantdock.CheckpointError)

    def test_a_missing_shard(self, sharded: Path) -> None:
        (sharded / "model-00002-of-00002.safetensors").unlink()
        refuses(sharded, "model-00002-of-00002.safetensors", error=quantdock.CheckpointError)

    def test_a_truncated_shard(self, sharded: Path) -> None:
        path = sharded / "model-00002-of-00002.safetensors"
        os.truncate(path, path.stat().st_size - 5)
        refuses(sharded, path.name, error=quantdock.CheckpointError)

    def test_an_empty_shard(self, sharded: Path) -> None:
        path = sharded / "model-00001-of-00002.safetensors"
        path.write_bytes(b"")
        refuses(sharded, path.name, error=quantdock.CheckpointError)

    def test_a_header_length_of_2_to_the_60(self, single: Path) -> None:
        raw = (single / WEIGHTS).read_bytes()
        (single / WEIGHTS).write_bytes(struct.pack("<Q", 2**60) + raw[8:])
        refuses(single, WEIGHTS, error=quantdock.CheckpointError)

    def test_overlapping_offsets(self, single: Path) -> None:
        def overlap(header: dict[str, Any]) -> None:
            names = sorted((name for name in header if name != "__metadata__"), key=lambda n: header[n]["data_offsets"])
            begin, end = header[names[1]]["data_offsets"]
            header[names[1]]["data_offsets"] = [begin - 16, end - 16]

        rewrite_header(single, overlap)
        refuses(single, WEIGHTS, error=quantdock.CheckpointError)

    def test_offsets_out_of_range(self, single: Path) -> None:
        def shift(header: dict[str, Any]) -> None:
            begin, end = header[UP]["data_offsets"]
            header[UP]["data_offsets"] = [begin + 2**40, end + 2**40]

        rewrite_header(single, shift)
        refuses(single, UP, error=quantdock.CheckpointError)

    def test_a_shape_that_would_overflow(self, single: Path) -> None:
        rewrite_header(single, lambda header: header[UP].update(shape=[2**62, 2**62]))
        refuses(single, UP, error=quantdock.CheckpointError)

    @pytest.mark.parametrize("path", ["../outside.safetensors", "sub/../../outside.safetensors"])
    def test_a_shard_path_that_leaves_the_folder(self, sharded: Path, path: str) -> None:
        shard = sharded / "model-00001-of-00002.safetensors"
        shard.rename(sharded.parent / "outside.safetensors")
        self._point(sharded, shard.name, path)
        refuses(sharded, path, error=quantdock.CheckpointError)

    def test_an_absolute_shard_path(self, sharded: Path) -> None:
        shard = sharded / "model-00001-of-00002.safetensors"
        outside = sharded.parent / "outside.safetensors"
        shard.rename(outside)
        self._point(sharded, shard.name, str(outside))
        refuses(sharded, str(outside), error=quantdock.CheckpointError)

    def test_a_link_that_leaves_the_folder(self, sharded: Path) -> None:
        shard = sharded / "model-00001-of-00002.safetensors"
        outside = sharded.parent / "outside.safetensors"
        shard.rename(outside)
        shard.symlink_to(outside)
        refuses(sharded, shard.name, error=quantdock.CheckpointError)

    @staticmethod
    def _point(folder: Path, old: str, new: str) -> None:
        def change(names: dict[str, str]) -> None:
            for name, file in names.items():
                if file == old:
                    names[name] = new

        rewrite_index(folder, change)


class TestPickles:
    @pytest.fixture
    def pickled(self, single: Path) -> Path:
        torch.save(load_file(single / WEIGHTS), single / "pytorch_model.bin")
        (single / WEIGHTS).unlink()
        return single

    def test_nobody_asked_for_them(self, pickled: Path) -> None:
        refuses(pickled, "pytorch_model.bin", "use_safetensors=False", error=quantdock.CheckpointError)

    def test_asked_for_they_load(self, pickled: Path, tiny: TinyFactory) -> None:
        model = quantdock.load(pickled, use_safetensors=False)
        with safe_open(tiny("llama") / WEIGHTS, framework="pt") as file:
            assert torch.equal(model.state_dict()[UP], file.get_tensor(UP))

    def test_one_that_would_run_code_does_not(self, single: Path) -> None:
        marker = single.parent / "code-ran"

        class Payload:
            def __reduce__(self) -> tuple[Any, ...]:
                return (os.mkdir, (str(marker),))

        torch.save({"model.norm.weight": Payload()}, single / "pytorch_model.bin")
        refuses(single, "pytorch_model.bin", error=quantdock.CheckpointError, use_safetensors=False)
        assert not marker.exists()


class TestConfig:
    def test_a_missing_config(self, single: Path) -> None:
        (single / "config.json").unlink()
        refuses(single, "config.json", error=quantdock.ConfigError)

    @pytest.mark.parametrize("content", ["", "{", "[]", '"text"', "\x00\xff", "[" * 100_000])
    def test_a_broken_config(self, single: Path, content: str) -> None:
        (single / "config.json").write_text(content, encoding="latin-1")
        refuses(single, "config.json", error=quantdock.ConfigError)

    def test_an_unknown_model_type(self, single: Path) -> None:
        config(single, model_type="lama")
        refuses(single, "'lama'", "llama", error=quantdock.ConfigError)

    def test_sizes_that_make_no_sense(self, single: Path) -> None:
        config(single, hidden_size="wide")
        refuses(single, "hidden_size", error=quantdock.ConfigError)

    def test_code_in_a_config_does_not_run(self, single: Path) -> None:
        marker = single.parent / "code-ran"
        (single / "modeling_evil.py").write_text(f"import os; os.mkdir({str(marker)!r})\n")
        config(single, model_type="evil", auto_map={"AutoConfig": "modeling_evil.Evil"})
        refuses(single, "trust_remote_code", error=quantdock.ConfigError)
        assert not marker.exists()

    def test_a_policy_can_forbid_remote_code(self, single: Path, tmp_path: Path) -> None:
        policy = tmp_path / "policy.toml"
        policy.write_text('[code]\nremote = "deny"\n')
        refuses(single, "trust_remote_code", error=quantdock.PolicyError, policy=policy, trust_remote_code=True)

    def test_an_unknown_method(self, single: Path) -> None:
        config(single, quantization_config={"quant_method": "gptqq", "bits": 4})
        refuses(single, "'gptqq'", "Installed", error=quantdock.UnknownMethodError)

    def test_a_known_method_that_is_not_installed(self, single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        found = importlib_metadata.distributions
        monkeypatch.setattr(
            importlib_metadata,
            "distributions",
            lambda: (one for one in found() if one.metadata["Name"] != "quantdock-awq"),
        )
        monkeypatch.syspath_prepend(single)  # another path is scanned anew
        config(single, quantization_config={"quant_method": "awq"})
        refuses(single, "'awq'", "pip install quantdock-awq", error=quantdock.UnknownMethodError)

    def test_a_quantization_config_without_a_method(self, single: Path) -> None:
        config(single, quantization_config={"bits": 4})
        refuses(single, "quant_method", error=quantdock.ConfigError)

    def test_an_unknown_preset(self, single: Path) -> None:
        refuses(single, "'bnb-nf5'", "bnb-nf4", error=quantdock.UnknownPresetError, quantize="bnb-nf5")

    def test_an_unknown_task(self, single: Path) -> None:
        refuses(single, "causal-ml", "causal-lm", error=quantdock.ConfigError, task="causal-ml")

    def test_a_source_that_does_not_exist(self, tmp_path: Path) -> None:
        refuses(tmp_path / "nowhere", "nowhere", error=quantdock.SourceError)

    @pytest.mark.parametrize("options", [{"dtype": "int8"}, {"memory_budget": "lots"}, {"workers": 0}])
    def test_options_out_of_range(self, single: Path, options: dict[str, Any]) -> None:
        refuses(single, next(iter(options)), error=quantdock.ConfigError, **options)
