"""Models that bring their own code: refused unless asked for, and then the class that transformers would use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import quantdock

CONFIGURATION = """
from transformers import PreTrainedConfig


class OwnConfig(PreTrainedConfig):
    model_type = "own-model"

    def __init__(self, width=8, **kwargs):
        self.width = width
        super().__init__(**kwargs)
"""
MODELING = """
import torch
from transformers import PreTrainedModel

from .configuration_own import OwnConfig


class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.layer = torch.nn.Linear(config.width, config.width)
        self.post_init()

    def forward(self, x):
        return self.layer(x)
"""
SCRIPT = """
import sys, torch, quantdock
from transformers import AutoModelForCausalLM
ours = quantdock.load(sys.argv[1], trust_remote_code=True)
theirs = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype="auto")
x = torch.ones(2, 8)
print(type(ours).__name__, type(ours).__module__.startswith("transformers_modules"), torch.equal(ours(x), theirs(x)))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    import torch
    from safetensors.torch import save_file

    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "configuration_own.py").write_text(CONFIGURATION)
    (folder / "modeling_own.py").write_text(MODELING)
    auto_map = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    config = {"model_type": "own-model", "width": 8, "auto_map": auto_map, "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    weights = {"layer.weight": torch.randn(8, 8), "layer.bias": torch.randn(8)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_it_is_refused_unless_asked_for(folder: Path) -> None:
    with pytest.raises(quantdock.ConfigError, match=r"configuration_own\.OwnConfig.*trust_remote_code=True"):
        quantdock.load(folder)


def test_asked_for_it_is_the_class_that_transformers_uses(folder: Path, tmp_path: Path) -> None:
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "error", "-c", SCRIPT, str(folder)]
    out = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert out.stdout.split() == ["OwnModel", "True", "True"], out.stderr
