"""Which parameter a stored name means: the same as transformers says, with less asking."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from quantdock import LedgerError, Routing, TensorSpec
from quantdock_transformers.conversions import route
from quantdock_transformers.names import Names, in_order

FAMILIES = [
    "mixtral", "qwen2_moe", "deepseek_v3", "legacy", "llava", "LlavaModel", "ernie4_5_vl_moe", "GPTNeoXForCausalLM",
    "inkling2", "kimi_linear", "ViTModel", "esm", "mllama", "hunyuan_vl",
]  # fmt: skip
WORDS = ["model", "language_model", "layers", "0", "17", "mlp", "experts", "weight", "bias", "lm_head", "h", "encoder"]


def transforms_of(family: str) -> list[Any]:
    return list(get_checkpoint_conversion_mapping(family) or ())


def by_kind(transforms: list[Any]) -> tuple[list[Any], list[Any]]:
    """The renamings and the converters."""
    return (
        [entry for entry in transforms if isinstance(entry, WeightRenaming)],
        [entry for entry in transforms if isinstance(entry, WeightConverter)],
    )


@pytest.mark.parametrize("family", FAMILIES)
@given(prefix=st.sampled_from(["model", ""]), data=st.data())
def test_names_mean_what_transformers_says(family: str, prefix: str, data: st.DataObject) -> None:
    ours, theirs, others = transforms_of(family), transforms_of(family), transforms_of(family)
    assert ours, "a family that transformers converts"
    own_words = {word for entry in ours for pattern in entry.source_patterns for word in re.findall(r"\w+", pattern)}
    words = st.sampled_from(WORDS) | st.sampled_from(sorted(own_words))
    names = data.draw(st.lists(st.lists(words, min_size=1, max_size=7).map(".".join), unique=True, max_size=6))
    found = {rename_source_key(name, *by_kind(others))[0] for name in names}
    pool = sorted(
        found | {f"{prefix}.{name}" for name in found} | {name.partition(".")[2] for name in found} | {*names}
    )
    slots = dict.fromkeys(data.draw(st.lists(st.sampled_from(pool), unique=True) if pool else st.just([])), 1)
    asked = Names(ours, slots, prefix)
    for name in names:
        expected = rename_source_key(name, *by_kind(theirs), prefix, slots)
        if expected[0] not in slots and name in slots:
            expected = rename_source_key(name, [], [], prefix, slots)
        assert asked.target(name) == expected
    assert [entry.was_used() for entry in ours] == [entry.was_used() for entry in theirs]


@given(names=st.lists(st.from_regex(r"([a-z]{0,2}_?[0-9]{0,2}\.?){0,6}", fullmatch=True), unique=True))
def test_the_order_is_transformers(names: list[str]) -> None:
    assert in_order(names) == sorted(names, key=dot_natural_key)


def routed(
    experts: int, layers: int, *, odd: tuple[int, ...] | None = None
) -> tuple[Routing, Mapping[str, TensorSpec]]:
    """Experts as Mixtral stores them, and as its classes hold them."""
    spec = {
        name: TensorSpec(dtype=torch.bfloat16, shape=shape) for name, shape in {"in": (6, 4), "out": (4, 6)}.items()
    }
    stored = {
        f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight": spec["out" if name == "down_proj" else "in"]
        for layer in range(layers)
        for expert in range(experts)
        for name in ("gate_proj", "up_proj", "down_proj")
    }
    if odd is not None:
        changed = f"model.layers.{layers - 1}.mlp.experts.{experts - 1}.down_proj.weight"
        stored[changed] = TensorSpec(dtype=torch.bfloat16, shape=odd)
    slots = {
        f"model.layers.{layer}.mlp.experts.{name}": TensorSpec(dtype=torch.bfloat16, shape=(experts, *shape))
        for layer in range(layers)
        for name, shape in {"gate_up_proj": (12, 4), "down_proj": (4, 6)}.items()
    }
    transforms = transforms_of("qwen2_moe")
    return route(transforms, stored, slots, config=None, base_model_prefix="model"), slots


def test_experts_of_all_layers_are_joined_alike() -> None:
    routing, slots = routed(5, 7)
    assert not routing.unmatched
    assert {name: spec for one in routing.conversions for name, spec in one.targets.items()} == slots
    for conversion in routing.conversions:
        (target,) = conversion.targets
        assert {source.split(".")[2] for source in conversion.sources} == {target.split(".")[2]}
        assert len(conversion.sources) == (10 if "gate_up" in target else 5)


def test_an_expert_of_another_shape_is_not_overlooked() -> None:
    with pytest.raises(LedgerError, match=r"experts\.\d+\.\w+"):
        routed(5, 7, odd=(4, 5))


def test_twice_the_experts_take_twice_the_calls() -> None:
    calls = []
    for experts in (4, 40, 80):  # the first for what is set up once
        count = 0

        def tally(_: object, event: str, __: object) -> None:
            nonlocal count
            count += event in ("call", "c_call")

        sys.setprofile(tally)
        try:
            routed(experts, 4)
        finally:
            sys.setprofile(None)
        calls.append(count)
    assert calls[2] < 2.1 * calls[1]
