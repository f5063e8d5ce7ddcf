"""The one matcher: shell-style on dotted names, for a parameter or a module that contains it."""

from __future__ import annotations

import fnmatch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantdock import PatternError
from quantdock.patterns import is_literal, matches, matching, require_matches

LETTERS = "ab01_"
PARTS = st.text(LETTERS, min_size=1, max_size=3)
NAMES = st.lists(PARTS, min_size=1, max_size=4).map(".".join)
PATTERNS = st.lists(
    st.one_of(st.sampled_from([*LETTERS, ".", "*", "?", "[ab]", "[!a]", "[0-9]", "**", ".*"])), min_size=1, max_size=8
).map("".join)


def containing(name: str) -> list[str]:
    """``a.b.c``, ``a.b``, ``a``: a name and every module that contains it."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), 0, -1)]


@given(PATTERNS, NAMES)
def test_a_pattern_matches_the_name_or_a_module_that_contains_it(pattern: str, name: str) -> None:
    assert matches(pattern, name) == any(fnmatch.fnmatchcase(whole, pattern) for whole in containing(name))


@given(NAMES, NAMES)
def test_a_literal_matches_itself_and_what_it_contains(pattern: str, name: str) -> None:
    assert is_literal(pattern)
    assert matches(pattern, name) == (name == pattern or name.startswith(f"{pattern}."))


@given(PATTERNS, NAMES, PARTS)
def test_what_matches_a_module_matches_everything_in_it(pattern: str, name: str, leaf: str) -> None:
    if matches(pattern, name):
        assert matches(pattern, f"{name}.{leaf}")


@given(NAMES)
def test_a_star_matches_everything(name: str) -> None:
    assert matches("*", name)


@given(st.text(max_size=12), NAMES)
def test_no_text_is_too_odd_for_a_pattern(pattern: str, name: str) -> None:
    assert matches(pattern, name) == any(fnmatch.fnmatchcase(whole, pattern) for whole in containing(name))


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("lm_head", "lm_head.weight", True),
        ("lm_head", "lm_head_2.weight", False),
        ("lm_head", "model.lm_head.weight", False),
        ("*.mlp", "model.layers.0.mlp.up_proj.weight", True),
        ("*.mlp.*", "model.layers.0.mlp.up_proj.weight", True),
        ("model.layers.?", "model.layers.7.mlp.up_proj.weight", True),
        ("model.layers.?", "model.layers.17.mlp.up_proj.weight", False),
        ("model.layers.[0-3]", "model.layers.4.mlp.weight", False),
        ("*.weight", "model.norm.weight", True),
        ("Model", "model.norm.weight", False),
        (r"a\Z", r"a\Z.weight", True),
        ("", "model.norm.weight", False),
    ],
)
def test_examples(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) is expected


def test_the_first_that_matches_counts() -> None:
    assert matching(["b", "a.*", "a.b"], "a.b.weight") == "a.*"
    assert matching(["b", "c"], "a.b.weight") is None


@pytest.mark.parametrize("pattern", ["*", "a?", "a[bc]"])
def test_wildcards_are_no_literal(pattern: str) -> None:
    assert not is_literal(pattern)


def test_a_pattern_that_matches_nothing_is_an_error_that_shows_what_there_is() -> None:
    names = [f"layers.{index}.weight" for index in range(9)]
    require_matches("skip", ["layers.1", "*.weight"], names, of="parameter")
    with pytest.raises(
        PatternError, match=r"skip: 'layer.1', 'head' matches no parameter. There are 9, for instance: l"
    ):
        require_matches("skip", ["layers.1", "layer.1", "head"], names, of="parameter")
    with pytest.raises(PatternError, match="There are 0, for instance: none"):
        require_matches("allow_missing", ["head"], [], of="parameter")
