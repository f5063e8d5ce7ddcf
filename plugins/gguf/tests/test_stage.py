"""The hooks: which file is taken, what is said when none can be, and what becomes of tensors without a parameter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.gguf import GGUF_CONFIG_ARCHS
from transformers.integrations.gguf.gguf_conversion_mapping import GGUF_ARCHS
from transformers.modeling_gguf_pytorch_utils import TensorProcessor, load_gguf_checkpoint

from quantdock import (
    Architecture,
    CheckpointError,
    ConfigError,
    LedgerError,
    LoadOptions,
    SourceError,
    load,
    plan,
)
from quantdock_gguf.architecture import GGUFArchitecture
from quantdock_gguf.config import derived_config, supported_architectures
from quantdock_gguf.header import read_header
from quantdock_gguf.naming import parameter_names
from quantdock_gguf.stage import GGUFStage
from quantdock_transformers.stage import TransformersStage

STAGES = (TransformersStage, GGUFStage)


def entries_of(path: Path) -> tuple[dict, dict]:
    """Metadata and tensors of a file, to write a variation of it."""
    reader = gguf.GGUFReader(path)
    skipped = ("GGUF.", "general.architecture")
    metadata = {key: field.contents() for key, field in reader.fields.items() if not key.startswith(skipped)}
    return metadata, {tensor.name: (np.array(tensor.data), tensor.tensor_type) for tensor in reader.tensors}


@pytest.fixture
def vary(write_gguf, tiny_llama):
    """Write the tiny llama again with other metadata and tensors."""

    def write(path: Path, metadata=None, tensors=None, *, without=()) -> Path:
        old_metadata, old_tensors = entries_of(tiny_llama)
        kept = {name: value for name, value in old_tensors.items() if name not in without}
        return write_gguf(path, "llama", old_metadata | (metadata or {}), kept | (tensors or {}))

    return write


def test_the_only_file_of_a_folder_is_taken(tiny_llama):
    found = plan(tiny_llama.parent, plugins=STAGES)
    assert found.checkpoint.format == "gguf"
    assert found.checkpoint.files == (tiny_llama,)
    assert found.checkpoint.metadata["general.architecture"] == "llama"
    assert found.config.origin == f"{tiny_llama} (metadata)"


def test_a_folder_with_a_config_is_not_ours_unless_the_file_is_named(tiny_llama):
    folder = tiny_llama.parent
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert GGUFStage().resolve_config(_source(folder), LoadOptions()) is None
    named = GGUFStage().resolve_config(_source(folder), LoadOptions(extras={"gguf_file": "tiny.gguf"}))
    assert named is not None
    assert named.data["hidden_size"] == 64
    assert plan(tiny_llama, plugins=STAGES).config.data["hidden_size"] == 64


def _source(folder: Path) -> SimpleNamespace:
    def find(name: str) -> Path | None:
        return folder / name if (folder / name).is_file() else None

    return SimpleNamespace(
        name=str(folder),
        single_file=None,
        find=find,
        fetch=lambda names: {name: path for name in names if (path := find(name))},
        listing=lambda: sorted(path.name for path in folder.iterdir()),
        is_inside=lambda path: path.resolve().is_relative_to(folder.resolve()),
    )


def test_of_several_files_one_has_to_be_named(vary, tiny_llama):
    vary(tiny_llama.parent / "other.gguf")
    with pytest.raises(SourceError, match=r"2 GGUF files \(other\.gguf, tiny\.gguf\).*extras=\{'gguf_file': 'other\."):
        plan(tiny_llama.parent, plugins=STAGES)
    found = plan(tiny_llama.parent, plugins=STAGES, extras={"gguf_file": "other.gguf"})
    assert found.checkpoint.files[0].name == "other.gguf"
    with pytest.raises(SourceError, match=r"there is no third\.gguf"):
        plan(tiny_llama.parent, plugins=STAGES, extras={"gguf_file": "third.gguf"})


def test_a_link_that_leads_out_of_the_source_is_refused(tiny_llama, tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "model.gguf").symlink_to(tiny_llama)
    with pytest.raises(CheckpointError, match="leads out of the source"):
        plan(folder, plugins=STAGES)


def test_other_sources_are_left_to_others_and_import_nothing(tmp_path):
    """The stage is asked at every load."""
    (tmp_path / "config.json").write_text("{}")
    program = (
        "import sys; from quantdock_gguf.stage import GGUFStage; "
        "assert not {'gguf', 'transformers'} & sys.modules.keys(), 'heavy imports'"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert GGUFStage().resolve_config(_source(tmp_path), LoadOptions()) is None
    assert GGUFStage().find_checkpoints(_source(tmp_path), SimpleNamespace(), LoadOptions()) is None


def test_a_config_of_the_users_own_comes_first(tiny_llama):
    config = AutoConfig.for_model(**derived_config([read_header(tiny_llama)]))
    config.dtype = "bfloat16"
    model = load(tiny_llama, config=config, plugins=STAGES)
    assert model.dtype == torch.bfloat16


# Split models


def split(vary, folder: Path) -> Path:
    """The tiny llama in two files, as llama.cpp's splitter writes them."""
    _, tensors = entries_of(vary(folder / "whole.gguf"))
    (folder / "whole.gguf").unlink()
    second = {name for name in tensors if name.startswith("blk.1.")}
    counts = {"split.count": 2, "split.tensors.count": len(tensors)}
    first = vary(folder / "tiny-00001-of-00002.gguf", {"split.no": 0, **counts}, without=second)
    writer = gguf.GGUFWriter(folder / "tiny-00002-of-00002.gguf", "llama")
    for key, value in {"split.no": 1, **counts}.items():
        writer.add_uint32(key, value)
    for name in second:
        raw, kind = tensors[name]
        writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return first


def test_the_parts_of_a_split_model_are_one_model(vary, tiny_llama, tmp_path):
    folder = tmp_path / "split"
    folder.mkdir()
    first = split(vary, folder)
    whole = load(tiny_llama, plugins=STAGES).state_dict()
    for source in (first, folder, folder / "tiny-00002-of-00002.gguf"):
        parts = load(source, plugins=STAGES).state_dict()
        assert all(torch.equal(parts[name], value) for name, value in whole.items())


def test_a_part_that_is_missing_or_renamed_is_said_to_be(vary, tmp_path):
    first = split(vary, tmp_path)
    second = tmp_path / "tiny-00002-of-00002.gguf"
    second.rename(tmp_path / "two.bin")
    with pytest.raises(SourceError, match=r"there is no tiny-00002-of-00002\.gguf, one of 2 parts of a split model"):
        plan(first, plugins=STAGES)
    second.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match=r"says that it is part 0 \(counted from 0\) of 2; .* part 1 of 2"):
        plan(first, plugins=STAGES)
    first.rename(tmp_path / "alone.gguf")
    with pytest.raises(CheckpointError, match=r"alone\.gguf: says that it is part 0 .* of 2; .* part 0 of 1"):
        plan(tmp_path / "alone.gguf", plugins=STAGES)


# Tensors and parameters that don't meet


def test_rotary_factors_are_ignored_with_the_reason(vary, tmp_path):
    factors = {"rope_freqs.weight": (np.ones(8, np.float32), Kind.F32)}
    found = plan(vary(tmp_path / "rope.gguf", tensors=factors), plugins=STAGES)
    assert found.match.ignored == {
        "rope_freqs.weight": "rotary factors, which transformers computes from the config instead"
    }


def test_any_other_tensor_without_a_parameter_is_an_error(vary, tmp_path):
    """transformers drops it without a word."""
    path = vary(tmp_path / "more.gguf", tensors={"blk.0.attn_sinks.weight": (np.ones(4, np.float32), Kind.F32)})
    with pytest.raises(LedgerError, match=r"'blk\.0\.attn_sinks\.weight'.* has no parameter in the model"):
        plan(path, plugins=STAGES)
    plan(path, plugins=STAGES, ignore_unexpected=["*attn_sinks*"])


def test_a_missing_tensor_is_an_error(vary, tmp_path):
    path = vary(tmp_path / "less.gguf", without=["blk.1.ffn_up.weight"])
    with pytest.raises(LedgerError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        plan(path, plugins=STAGES)


@pytest.mark.parametrize("name", ["blk.0.attn_q.weight", "blk.0.attn_v.weight"])
def test_a_tensor_of_another_shape_is_an_error_before_it_is_read(vary, tmp_path, name):
    path = vary(tmp_path / "wide.gguf", tensors={name: (np.ones((64, 32), np.float32), Kind.F32)})
    with pytest.raises(LedgerError, match=rf"checkpoint gives \[64, 32\] \('{name}'"):
        plan(path, plugins=STAGES)


@pytest.mark.parametrize("missing", ["gate", "up"])
def test_half_of_the_fused_experts_is_an_error(missing):
    """transformers leaves zeros in the other half."""
    from transformers.modeling_gguf_pytorch_utils import Qwen2MoeTensorProcessor

    from quantdock import TensorSpec
    from quantdock_gguf.routing import ProcessorRouting

    names = {f"blk.0.ffn_{part}_exps": "experts.gate_up_proj" for part in ("gate", "up")}
    present = "up" if missing == "gate" else "gate"
    stored = {f"blk.0.ffn_{present}_exps.weight": TensorSpec(dtype=torch.float32, shape=(2, 4, 8))}
    slots = {"experts.gate_up_proj": TensorSpec(dtype=torch.float32, shape=(2, 8, 8))}
    routing = ProcessorRouting(processor=Qwen2MoeTensorProcessor(), names=names).route(stored, slots)
    assert not routing.conversions
    assert routing.unmatched == {f"blk.0.ffn_{present}_exps.weight": "experts.gate_up_proj"}


# Configs


def test_an_unknown_architecture_is_named_with_those_that_are_known(write_gguf, tmp_path):
    path = write_gguf(tmp_path / "rwkv.gguf", "rwkv7", {}, {"w": (np.ones(1, np.float32), Kind.F32)})
    with pytest.raises(ConfigError, match=r"rwkv\.gguf: is a 'rwkv7' model; .*bloom, .*llama, .*t5encoder"):
        plan(path, plugins=STAGES)


def test_the_list_of_architectures_is_that_of_transformers(write_gguf, tmp_path):
    assert GGUF_CONFIG_ARCHS.keys() == GGUF_ARCHS.keys()
    for architecture in supported_architectures():
        path = write_gguf(tmp_path / "any.gguf", architecture, {}, {"w": (np.ones(1, np.float32), Kind.F32)})
        if architecture in GGUF_CONFIG_ARCHS or architecture == "minimax-m2":
            continue  # want more metadata than none
        assert derived_config([read_header(path)]) == load_gguf_checkpoint(str(path))["config"]


def test_metadata_that_makes_no_config_is_said_to_be_incomplete(write_gguf, tmp_path):
    path = write_gguf(tmp_path / "bare.gguf", "qwen35", {}, {"w": (np.ones(1, np.float32), Kind.F32)})
    with pytest.raises(ConfigError, match=r"bare\.gguf: transformers can't make a config of its 'qwen35' metadata"):
        plan(path, plugins=STAGES)


def test_more_layers_than_tensors_are_refused(vary, tmp_path):
    path = vary(tmp_path / "deep.gguf", {"llama.block_count": 2**31})
    with pytest.raises(ConfigError, match=r"deep\.gguf: claims 2147483648 layers, but has 20 tensors"):
        plan(path, plugins=STAGES)


def test_metadata_beyond_any_config_is_refused(vary, tmp_path):
    path = vary(tmp_path / "wordy.gguf", {"general.description": "x" * 2**21})
    with pytest.raises(ConfigError, match="bytes of metadata besides the tokenizer"):
        plan(path, plugins=STAGES)


def test_a_vocabulary_that_is_a_number_allocates_nothing(vary, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "number.gguf", "llama")
    writer.add_uint64("tokenizer.ggml.tokens", 2**62)
    writer.add_tensor("w", np.ones(1, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConfigError, match="can't make a config"):
        plan(tmp_path / "number.gguf", plugins=STAGES)


def test_a_llama_named_mistral_is_one(vary, tmp_path):
    """transformers makes a mistral config of it, and then finds no names for its tensors."""
    path = vary(tmp_path / "named.gguf", {"general.name": "mistral"})
    config = derived_config([read_header(path)])
    assert config == load_gguf_checkpoint(str(path))["config"]
    assert config["model_type"] == "mistral"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    names = parameter_names(model, TensorProcessor(config=config), [read_header(path)])
    assert set(names.values()) == model.state_dict().keys()
    assert type(load(path, plugins=STAGES)).__name__ == "MistralForCausalLM"


# Around it


def test_every_other_duty_is_the_inner_architectures(tiny_llama):
    """If this fails, a duty was added to Architecture that neither the wrapper nor the wrapped answers for."""
    inner = Architecture()
    outer = GGUFArchitecture(inner, torch.nn.Linear(1, 1), [read_header(tiny_llama)])
    duties = {name for name in vars(Architecture) if not name.startswith("_")}
    own = {name for name in vars(GGUFArchitecture) if not name.startswith("_")}
    assert own == {"route", "may_be_unexpected"}
    for duty in duties - own:
        assert getattr(outer, duty) == getattr(inner, duty)
    assert outer.may_be_unexpected("blk.0.attn_q.weight", "q") is None


def test_a_module_of_the_users_own_gets_the_tensors_under_their_own_names(vary, tmp_path):
    class Mine(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token_embd = torch.nn.Embedding(96, 64)

    _, tensors = entries_of(vary(tmp_path / "mine.gguf"))
    wanted = gguf.dequantize(*tensors["token_embd.weight"])
    model = load(tmp_path / "mine.gguf", model=Mine, ignore_unexpected=["blk.*", "output_norm"], plugins=STAGES)
    assert torch.equal(model.token_embd.weight, torch.from_numpy(wanted))


def test_checkpoints_of_other_formats_pass_through_the_wrapper():
    hook = GGUFStage().build_model(SimpleNamespace(format="safetensors"))
    next(hook)
    skeleton = object()
    with pytest.raises(StopIteration) as stopped:
        hook.send(skeleton)
    assert stopped.value.value is skeleton
