"""Config objects of other libraries as ``quantize=``: a plugin claims them by the name of their class or of a base."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import quantdock
from quantdock import ConfigError, PluginConflictError, PluginError, PolicyError, UnknownMethodError
from quantdock.cli.app import app
from quantdock.testing import SmallModel, installed_plugin, write_checkpoint

EXAMPLE = (Path(__file__).parents[2] / "tests" / "toy_plugin" / "quantdock_toy.py").read_text(encoding="utf-8")
READER = """
def read(theirs):
    if theirs.bits != 8:
        raise ConfigError(f"theirs has bits={theirs.bits}, expected 8")
    return ToyConfig(bits=theirs.bits)


def read_nothing(theirs):
    return str(theirs.bits)
"""
METHOD = {"quantdock.quantizers": {"claimed": "claiming_plugin:ToyQuantizer"}}

Claim = Callable[..., None]


class Theirs:
    """A library's base of all configs."""

    bits = 8


class Special(Theirs):
    """One of them."""


class Odd(Theirs):
    bits = 5


def name_of(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


@pytest.fixture
def claim(tmp_path: Path) -> Iterator[Claim]:
    """``claim("dist", "module.Class")``: a plugin that reads objects of this class, until the test ends."""
    with ExitStack() as stack:

        def enter(dist: str, name: str, value: str = "claiming_plugin:read", methods: Any = METHOD) -> None:
            plugin = installed_plugin(
                tmp_path / "site",
                dist=dist,
                version="1.0",
                entry_points=methods | {"quantdock.configs": {name: value}},
                modules={"claiming_plugin": EXAMPLE.replace('"toy"', '"claimed"') + READER},
            )
            stack.enter_context(plugin)

        yield enter


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def load(folder: Path, quantize: Any, **options: Any) -> Any:
    return quantdock.load(folder, model=SmallModel, quantize=quantize, **options)


@pytest.mark.parametrize("cls", [Theirs, Special])
def test_an_object_of_a_claimed_class_is_read_by_its_plugin(claim: Claim, folder: Path, cls: type) -> None:
    claim("claiming-plugin", name_of(Theirs))
    assert quantdock.report(load(folder, cls())).ledger.coverage.keys() == {"", "claimed"}
    by_pattern = load(folder, {"*.up": cls(), "*": None})
    taken = {entry.parameter for entry in quantdock.report(by_pattern).ledger.entries if entry.method}
    assert taken == {"blocks.0.up.weight", "blocks.1.up.weight"}


def test_what_the_plugin_says_of_an_object_is_what_the_user_sees(claim: Claim, folder: Path) -> None:
    claim("claiming-plugin", name_of(Theirs))
    with pytest.raises(ConfigError, match="theirs has bits=5, expected 8"):
        load(folder, Odd())


def test_a_saved_model_takes_the_object_as_the_override_that_it_is(claim: Claim, folder: Path, tmp_path: Path) -> None:
    claim("claiming-plugin", name_of(Theirs))
    saved = quantdock.save(load(folder, Theirs()), tmp_path / "saved")
    assert quantdock.report(load(saved, Theirs())).ledger.coverage.keys() == {"", "claimed"}


def test_the_nearest_claim_of_two_counts(claim: Claim, folder: Path) -> None:
    claim("claiming-plugin", name_of(Special))
    claim("other-plugin", name_of(Theirs), "no_such_module:read", methods={})
    load(folder, Special())


def test_two_claims_of_one_class_are_an_error_that_names_both(claim: Claim, folder: Path) -> None:
    claim("one-plugin", name_of(Theirs))
    claim("two-plugin", name_of(Theirs))
    with pytest.raises(PluginConflictError, match=r"Theirs' \(quantdock.configs\) is claimed by (one|two)-plugin 1.0"):
        load(folder, Special())


def test_a_claim_that_the_policy_refuses_is_not_read(claim: Claim, folder: Path, tmp_path: Path) -> None:
    claim("claiming-plugin", name_of(Theirs))
    policy = tmp_path / "policy.toml"
    policy.write_text('[plugins]\ndefault = "deny"\n')
    with pytest.raises(PolicyError, match=r"Theirs' is offered by claiming-plugin 1.0, which the policy refuses"):
        load(folder, Theirs(), policy=policy)


def test_a_claim_that_gives_no_config_is_an_error_that_names_the_plugin(claim: Claim, folder: Path) -> None:
    claim("claiming-plugin", name_of(Theirs), "claiming_plugin:read_nothing")
    with pytest.raises(
        PluginError, match=r"claiming-plugin 1.0 claims objects of .*Theirs, but .*:read_nothing made str of one"
    ):
        load(folder, Theirs())


def test_nobody_can_claim_what_python_itself_makes(claim: Claim, folder: Path) -> None:
    claim("claiming-plugin", "builtins.object")
    with pytest.raises(ConfigError, match=r"expected a preset name, .*; no installed plugin takes a .*Theirs"):
        load(folder, Theirs())


def test_a_class_in_the_place_of_an_object_is_said_to_be_one(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"quantize= is the class Theirs; expected an object: Theirs\(\.\.\.\)"):
        load(folder, Theirs)


def test_the_plugin_that_is_missing_is_named(folder: Path) -> None:
    """By the library that the class comes from; none of the libraries is asked for it."""
    book = json.loads((Path(quantdock.__file__).parent / "known_plugins.json").read_text(encoding="utf-8"))["methods"]
    library, package = next((name, package) for name, package in book.items() if name.isidentifier())
    theirs = type("SomeConfig", (Theirs,), {"__module__": f"{library}.some.module"})
    with pytest.raises(
        UnknownMethodError,
        match=rf"quantize= is a {library}\.some\.module\.SomeConfig, and no .* pip install {package}",
    ):
        load(folder, theirs())


def test_claims_are_listed_without_importing_anything(claim: Claim) -> None:
    claim("claiming-plugin", "theirs.configs.Config", "no_such_module:read")
    listed = json.loads(CliRunner().invoke(app, ["plugins", "--json"]).stdout)["plugins"]
    (found,) = [one for one in listed if one["kind"] == "config" and one["distribution"] == "claiming-plugin"]
    assert found["name"] == "theirs.configs.Config"
