"""What is listed as left alone is exactly that, for those who read the list as transformers does."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.quantizers.quantizers_utils import should_convert_module

from quantdock import SkipList

names = st.text(alphabet="ab1_.", min_size=1, max_size=9).filter(lambda name: all(name.split(".")))
entries = st.one_of(names, st.sampled_from(["a.*", "^b$", r"layers\.\d+\.up", "(a|b)", "1"]))


@given(st.lists(entries, max_size=4), st.lists(names, max_size=6))
def test_entries_match_as_in_transformers(patterns: list[str], modules: list[str]) -> None:
    skip = SkipList(patterns)
    for module in modules:
        assert (skip.match(module) is None) == should_convert_module(module, patterns)


NAMES = st.from_regex(r"(?:(?:layer|layers|h|mlp|gate|gate_proj|fc1|lm_head|[0-9]{1,2})(?:\.|\Z)){1,5}", fullmatch=True)
PATTERNS = st.one_of(
    NAMES,
    st.sampled_from(["lm_head", "layer.*", "h.1", "fc1", "mlp.gate", r"layers\.[01]", "gate|fc1", r"h\.\d+\.mlp", "."]),
)


@given(name=NAMES, pattern=PATTERNS)
def test_names_of_models_match_as_in_transformers(name: str, pattern: str) -> None:
    name = name.strip(".") or "h"
    assert (SkipList([pattern]).match(name) is None) == should_convert_module(name, [pattern])


@given(st.lists(entries, max_size=3), st.sets(names, max_size=8), st.sets(names, max_size=8))
def test_what_is_listed_is_what_was_left(patterns: list[str], left: set[str], taken: set[str]) -> None:
    left -= taken
    result = SkipList(patterns).extended(left, taken)
    assert result[: len(patterns)] == patterns
    assert not any(should_convert_module(module, result) for module in left)
    for module in taken:
        assert should_convert_module(module, result) == should_convert_module(module, patterns)


@pytest.mark.parametrize(
    ("left", "taken", "expected"),
    [
        (["lm_head"], ["layers.0.up", "layers.0.down"], ["lm_head"]),
        (["up"], ["layers.0.up"], ["^up$"]),
        (["layers.1"], ["layers.1.up"], [r"^layers\.1$"]),
        (["layers.1", "layers.11"], ["layers.12"], ["layers.1", "layers.11"]),
        (["h.1"], ["h_1"], [r"^h\.1$"]),
        (["mlp.gate", "layers.0.mlp.gate"], ["layers.0.mlp.gate_proj"], ["layers.0.mlp.gate", "mlp.gate"]),
    ],
)
def test_plain_names_where_they_will_do(left: list[str], taken: list[str], expected: list[str]) -> None:
    assert SkipList([]).extended(left, taken) == expected
