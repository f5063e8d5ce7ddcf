"""Compare what quantdock loads with what transformers loads, bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from tests.tiny_models import logits_of


def assert_same_tensor(ours: torch.Tensor, theirs: torch.Tensor, name: str) -> None:
    """Equal dtype, shape and bits (NaNs and signed zeros included)."""
    assert ours.dtype == theirs.dtype, f"{name}: {ours.dtype} is not {theirs.dtype}"
    assert ours.shape == theirs.shape, f"{name}: {tuple(ours.shape)} is not {tuple(theirs.shape)}"
    left, right = (tensor.detach().contiguous().flatten().view(torch.uint8) for tensor in (ours, theirs))
    assert torch.equal(left, right), f"{name} differs"


def assert_same_state(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    """Equal state dicts, in the same order, and equal buffers that aren't part of them."""
    left, right = ours.state_dict(), theirs.state_dict()
    assert list(left) == list(right)
    for name, tensor in right.items():
        assert_same_tensor(left[name], tensor, name)
    buffers = dict(ours.named_buffers())
    for name, tensor in theirs.named_buffers():
        assert_same_tensor(buffers[name], tensor, name)


def assert_same_model(ours: Any, theirs: Any) -> None:
    """Same class, state, ties, flags and logits."""
    assert type(ours) is type(theirs)
    assert_same_state(ours, theirs)
    trainable = [name for name, parameter in theirs.named_parameters() if parameter.requires_grad]
    assert [name for name, parameter in ours.named_parameters() if parameter.requires_grad] == trainable
    assert not ours.training
    if theirs.can_generate():
        assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    assert_same_tensor(logits_of(ours), logits_of(theirs), "logits")
