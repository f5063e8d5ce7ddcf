"""``from quantdock import AutoModel...`` in place of transformers'."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.conftest import TinyFactory
from tests.reference import assert_same_model, assert_same_state

import quantdock


def test_causal_lm_with_transformers_arguments(tiny: TinyFactory) -> None:
    import transformers

    arguments = {"torch_dtype": torch.float32, "attn_implementation": "eager", "low_cpu_mem_usage": True}
    ours = quantdock.AutoModelForCausalLM.from_pretrained(tiny("llama"), **arguments)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tiny("llama"), dtype=torch.float32, attn_implementation="eager"
    )
    assert_same_model(ours, theirs)
    assert ours.config._attn_implementation == "eager"


def test_config_attributes_as_arguments(tiny: TinyFactory) -> None:
    model = quantdock.AutoModelForCausalLM.from_pretrained(tiny("llama"), output_attentions=False, rms_norm_eps=0.5)
    assert model.config.rms_norm_eps == 0.5
    with pytest.raises(quantdock.ConfigError, match="'no_such_argument'"):
        quantdock.AutoModelForCausalLM.from_pretrained(tiny("llama"), no_such_argument=1)


def test_a_config_object_and_overrides(tiny: TinyFactory) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(tiny("llama"))
    config.rms_norm_eps = 0.25
    assert quantdock.load(tiny("llama"), config=config).config.rms_norm_eps == 0.25
    assert config.rms_norm_eps == 0.25
    overridden = quantdock.load(tiny("llama"), config_overrides={"rms_norm_eps": 0.125})
    assert overridden.config.rms_norm_eps == 0.125


def test_a_quantization_config_object(tiny: TinyFactory) -> None:
    from transformers import BitsAndBytesConfig

    model = quantdock.AutoModelForCausalLM.from_pretrained(
        tiny("llama"), quantization_config=BitsAndBytesConfig(load_in_8bit=True)
    )
    assert model.is_loaded_in_8bit
    with pytest.raises(quantdock.ConfigError, match="quantization_config"):
        quantdock.AutoModelForCausalLM.from_pretrained(tiny("llama"), load_in_4bit=True)


def test_the_base_model_of_a_checkpoint_with_a_head(tiny: TinyFactory) -> None:
    """The head has no place in the base model; transformers drops it with a warning, we only when told to."""
    import transformers

    with pytest.raises(quantdock.LedgerError, match=r"lm_head\.weight"):
        quantdock.AutoModel.from_pretrained(tiny("llama"))
    ours = quantdock.AutoModel.from_pretrained(tiny("llama"), ignore_unexpected=["lm_head"])
    theirs = transformers.AutoModel.from_pretrained(tiny("llama"), dtype="auto")
    assert type(ours) is type(theirs)
    assert_same_state(ours, theirs)


def test_a_new_task_head_is_initialised_with_a_warning(tiny: TinyFactory, tmp_path: Path) -> None:
    base = quantdock.load(tiny("llama"), task="base", ignore_unexpected=["lm_head"])
    quantdock.save(base, tmp_path / "base")
    with pytest.raises(quantdock.LedgerError, match=r"score\.weight"):
        quantdock.load(tmp_path / "base", task="sequence-classification", config_overrides={"pad_token_id": 0})
    with pytest.warns(UserWarning, match=r"score\.weight"):
        model = quantdock.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    assert model.score.weight.shape == (3, model.config.hidden_size)
    assert model.score.weight.float().std() > 0
    assert quantdock.report(model).ledger.allowed.keys() == {"score.weight"}


def test_inside_the_base_model_nothing_may_be_missing(tiny_copy: TinyFactory) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny_copy("llama")
    tensors = load_file(folder / "model.safetensors")
    gone = "model.layers.1.mlp.up_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != gone}, folder / "model.safetensors")
    with pytest.raises(quantdock.LedgerError, match=gone):
        quantdock.AutoModelForCausalLM.from_pretrained(folder)


def test_generate_pipeline_and_save_pretrained(tiny: TinyFactory, tmp_path: Path) -> None:
    import transformers

    model = quantdock.AutoModelForCausalLM.from_pretrained(tiny("llama"), quantization_config="bnb-nf4")
    ids = torch.tensor([[1, 2, 3]])
    generated = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert generated.shape[1] > 3
    vocabulary = {f"t{index}": index for index in range(model.config.vocab_size)}
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="t0", eos_token="t1")
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    assert pipe("t5 t6", max_new_tokens=3, do_sample=False)[0]["generated_text"].startswith("t5 t6")
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["quantization_config"]["quant_method"] == "bitsandbytes"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own call
def test_peft_trains_on_top(tiny: TinyFactory) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = quantdock.load(tiny("llama"), quantize="bnb-nf4")
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    assert type(model.base_model.model.model.layers[0].self_attn.q_proj).__module__.endswith("bnb")
    model.train()
    ids = torch.arange(8)[None]
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
    assert trained
    assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in trained)
