"""How plugins are found: from metadata alone, the one that is needed, and never one of two silently."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import importlib_metadata
import pytest
import torch

import quantdock
from quantdock import (
    ConfigError,
    PluginConflictError,
    PluginError,
    UnknownMethodError,
    UnknownPresetError,
    hookimpl,
)
from quantdock.testing import SmallModel, in_new_process, installed_plugin, write_checkpoint

EXAMPLE = Path(__file__).parents[2] / "tests" / "toy_plugin" / "quantdock_toy.py"
NAMED = EXAMPLE.read_text(encoding="utf-8").replace('"toy"', '"named"')
"""The example plugin under a ``quant_method`` that no installed distribution has."""

QUANTIZER = {"quantdock.quantizers": {"named": "named_plugin:ToyQuantizer"}}
BOTH = QUANTIZER | {"quantdock.presets": {"named-int8": "named_plugin:INT8"}}

Offer = Callable[..., Path]


@pytest.fixture
def offer(tmp_path: Path) -> Iterator[Offer]:
    """``offer("dist", entry_points, module="source")``: offered until the test ends."""
    with ExitStack() as stack:

        def enter(
            dist: str,
            entry_points: Mapping[str, Mapping[str, str]],
            modules: Mapping[str, str] | None = None,
            version: str = "1.0",
        ) -> Path:
            found = modules or {"named_plugin": NAMED}
            plugin = installed_plugin(tmp_path, dist=dist, version=version, entry_points=entry_points, modules=found)
            return stack.enter_context(plugin)

        yield enter


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def load(folder: Path, **options: object) -> torch.nn.Module:
    return quantdock.load(folder, model=SmallModel, **options)  # type: ignore[arg-type]


# Listing ----------------------------------------------------------------------------------------------------------


def test_importing_and_listing_import_neither_torch_nor_a_plugin(offer: Offer) -> None:
    offer("named-plugin", BOTH, {"named_plugin": "raise RuntimeError('imported')"})
    printed = in_new_process(
        "-c",
        "import json, sys, quantdock\n"
        "before = list(sys.modules)\n"
        "listed = [dict(quantdock.quantizers()), dict(quantdock.presets())]\n"
        "print(json.dumps([listed, before, list(sys.modules)]))",
    )
    (methods, presets), before, after = json.loads(printed)
    assert methods["named"] == presets["named-int8"] == "named-plugin 1.0"
    assert "torch" not in after
    assert "named_plugin" not in after
    assert {name.partition(".")[0] for name in before} & {"torch", "numpy", "safetensors", "transformers"} == set()


def test_lists_are_read_only(offer: Offer) -> None:
    offer("named-plugin", BOTH)
    assert quantdock.quantizers()["named"] == "named-plugin 1.0"
    with pytest.raises(TypeError, match="does not support item assignment"):
        quantdock.quantizers()["named"] = "mine"  # type: ignore[index]


def test_only_the_plugin_that_is_needed_is_imported(offer: Offer, folder: Path) -> None:
    offer("other-plugin", {"quantdock.quantizers": {"other": "other_plugin:Q"}}, {"other_plugin": "raise SystemExit"})
    offer("named-plugin", BOTH)
    assert quantdock.report(load(folder, quantize="named-int8")).ledger.coverage.keys() == {"", "named-int8"}


def test_the_first_of_two_versions_on_the_path_counts(offer: Offer) -> None:
    offer("named-plugin", BOTH, version="1.0")
    offer("named_Plugin", BOTH, version="2.0")  # the same name, as PEP 503 has it; in front of the other
    assert quantdock.quantizers()["named"] == "named-plugin 2.0"


# Two of one name --------------------------------------------------------------------------------------------------


def test_two_distributions_with_one_method_are_an_error_that_names_both(offer: Offer, folder: Path) -> None:
    offer("one-plugin", BOTH)
    offer("two-plugin", QUANTIZER, {"two": ""}, version="2.1")
    with pytest.raises(PluginConflictError, match=r"'named' \(quantdock.quantizers\) is claimed by") as error:
        load(folder, quantize={"quant_method": "named"})
    assert "one-plugin 1.0" in str(error.value)
    assert "two-plugin 2.1" in str(error.value)
    assert '[choose] "named" = ' in str(error.value)


def test_two_distributions_with_one_preset_are_an_error_that_names_both(offer: Offer, folder: Path) -> None:
    offer("one-plugin", BOTH)
    offer("two-plugin", {"quantdock.presets": {"named-int8": "two:INT8"}}, {"two": ""})
    with pytest.raises(
        PluginConflictError, match=r"'named-int8' .* is claimed by (one|two)-plugin 1.0 and (one|two)-plugin 1.0"
    ):
        load(folder, quantize="named-int8")


def test_two_stages_of_one_name_are_an_error_in_every_load(offer: Offer, folder: Path) -> None:
    stages = {"quantdock.stages": {"files": "stage_plugin:Stage"}}
    for dist in ("one-plugin", "two-plugin"):
        offer(dist, stages, {"stage_plugin": "class Stage: pass"})
    with pytest.raises(PluginConflictError, match=r"'files' \(quantdock.stages\) is claimed by"):
        load(folder)


def test_a_conflict_breaks_only_loads_that_need_the_name(offer: Offer, folder: Path) -> None:
    offer("one-plugin", BOTH)
    offer("two-plugin", QUANTIZER, {"two": ""})
    load(folder)


@pytest.mark.parametrize("chosen", ["one-plugin", "two-plugin"])
def test_the_policy_can_choose_between_two(offer: Offer, folder: Path, tmp_path: Path, chosen: str) -> None:
    for dist in ("one-plugin", "two-plugin"):
        offer(dist, BOTH)
    policy = tmp_path / "policy.toml"
    policy.write_text(f'[choose]\nnamed = "{chosen}"\nnamed-int8 = "{chosen}"\n')
    report = quantdock.report(load(folder, quantize="named-int8", policy=policy))
    assert {entry.by for entry in report.ledger.entries if entry.method} == {chosen}


# Broken ones ------------------------------------------------------------------------------------------------------


def test_a_broken_plugin_breaks_only_loads_that_need_it(offer: Offer, folder: Path) -> None:
    offer("named-plugin", BOTH, {"named_plugin": "import a_library_that_nobody_has"})
    load(folder)
    expected = (
        r"named-plugin 1.0 offers 'named-int8' \(quantdock.presets\), but importing named_plugin:INT8 failed: "
        r"ModuleNotFoundError: No module named 'a_library_that_nobody_has'.*pip uninstall named-plugin"
    )
    with pytest.raises(PluginError, match=expected) as error:
        load(folder, quantize="named-int8")
    assert isinstance(error.value.__cause__, ModuleNotFoundError)


def test_a_broken_stage_is_left_out_logged_and_reported(
    offer: Offer, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    offer("stage-plugin", {"quantdock.stages": {"files": "stage_plugin:Stage"}}, {"stage_plugin": "1 / 0"})
    with caplog.at_level(logging.WARNING, logger="quantdock"):
        report = quantdock.report(load(folder))
    assert "ZeroDivisionError" in report.broken["stage-plugin"]
    assert "stage-plugin 1.0 offers 'files'" in caplog.text


def test_an_entry_point_of_a_missing_attribute_is_named(offer: Offer, folder: Path) -> None:
    offer("named-plugin", {"quantdock.quantizers": {"named": "named_plugin:Missing"}})
    with pytest.raises(PluginError, match="importing named_plugin:Missing failed: AttributeError"):
        load(folder, quantize={"quant_method": "named"})


@pytest.mark.parametrize("value", ["ToyLinear", "quantize", "INT8"])
def test_an_entry_point_that_is_no_quantizer_is_named(offer: Offer, folder: Path, value: str) -> None:
    offer("named-plugin", {"quantdock.quantizers": {"named": f"named_plugin:{value}"}})
    expected = f"named-plugin 1.0: named_plugin:{value} is no subclass of quantdock.Quantizer"
    with pytest.raises(PluginError, match=expected):
        load(folder, quantize={"quant_method": "named"})


def test_a_preset_that_is_no_config_is_named(offer: Offer, folder: Path) -> None:
    offer("named-plugin", QUANTIZER | {"quantdock.presets": {"named-int8": "named_plugin:ToyConfig"}})
    expected = r"named-plugin 1.0: preset 'named-int8' is type \(named_plugin:ToyConfig\), expected a Quant"
    with pytest.raises(PluginError, match=expected):
        load(folder, quantize="named-int8")


# Names that nobody offers -----------------------------------------------------------------------------------------


def _hide(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As if a distribution weren't installed, whether it is or not."""
    found = importlib_metadata.distributions
    monkeypatch.setattr(
        importlib_metadata, "distributions", lambda: (one for one in found() if one.metadata["Name"] != name)
    )


def test_an_unknown_method_says_what_is_installed_and_what_to_install(
    offer: Offer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer("named-plugin", BOTH)
    _hide(monkeypatch, "quantdock-awq")
    with pytest.raises(UnknownMethodError, match=r"serves quant_method 'nmaed'.*named \(named-plugin 1.0\)") as error:
        load(folder, quantize={"quant_method": "nmaed"})
    assert "Install the plugin that serves it, or check the spelling." in str(error.value)
    with pytest.raises(UnknownMethodError, match="Install it with: pip install quantdock-awq"):
        load(folder, quantize={"quant_method": "awq"}, policy=only(folder.parent, "named-plugin"))


def test_an_unknown_preset_says_what_is_installed_and_what_to_install(
    offer: Offer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer("named-plugin", BOTH)
    _hide(monkeypatch, "quantdock-fp8")
    with pytest.raises(UnknownPresetError, match=r"'named-int4'.*named-int8 \(named-plugin 1.0\).*check the spelling"):
        load(folder, quantize="named-int4")
    with pytest.raises(UnknownPresetError, match=r"the preset 'fp8-row'.*pip install quantdock-fp8"):
        load(folder, quantize="fp8-row")


def test_an_unknown_method_of_a_checkpoint_never_loads_unquantized(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "unheard-of"}}))
    with pytest.raises(UnknownMethodError, match="quant_method 'unheard-of'"):
        load(folder)


def test_what_quantize_takes_is_said_when_it_is_something_else(folder: Path) -> None:
    with pytest.raises(ConfigError, match="quantize=8: expected a preset name, a config object"):
        load(folder, quantize=8)
    with pytest.raises(ConfigError, match=r"quantize=\{\} names no pattern"):
        load(folder, quantize={})


def only(folder: Path, *allowed: str) -> Path:
    """A policy that allows only these distributions."""
    policy = folder / "policy.toml"
    policy.write_text(f'[plugins]\ndefault = "deny"\nallow = {json.dumps(allowed)}\n')
    return policy


# Hooks ------------------------------------------------------------------------------------------------------------


def test_a_misspelt_hook_is_an_error(folder: Path) -> None:
    class Misspelt:
        @hookimpl
        def postprocess_modle(self, model: torch.nn.Module) -> None: ...

    with pytest.raises(PluginError, match=r"plugin plugins\[0\]: .*postprocess_modle.*docs/hooks.md"):
        load(folder, plugins=[Misspelt])


def test_a_hook_with_an_unknown_argument_is_an_error(folder: Path) -> None:
    class Curious:
        @hookimpl
        def postprocess_model(self, model: torch.nn.Module, mood: str) -> None: ...

    with pytest.raises(PluginError, match=r"(?s)plugins\[0\].*mood"):
        load(folder, plugins=[Curious()])


def test_a_misspelt_hook_of_an_installed_stage_names_its_distribution(offer: Offer, folder: Path) -> None:
    source = "import quantdock\nclass Stage:\n    @quantdock.hookimpl\n    def find_checkpoint(self, source): pass\n"
    offer("stage-plugin", {"quantdock.stages": {"files": "stage_plugin:Stage"}}, {"stage_plugin": source})
    with pytest.raises(PluginError, match=r"plugin files \(stage-plugin 1.0\): .*find_checkpoint"):
        load(folder)


def test_a_stage_that_forgets_the_decorator_is_an_error_when_the_class_is_made() -> None:
    def preprocess_model(self: object, model: torch.nn.Module) -> None: ...

    with pytest.raises(TypeError, match=r"Forgetful\.preprocess_model would never be called: decorate it with @quant"):
        type("Forgetful", (quantdock.Quantizer,), {"preprocess_model": preprocess_model})


def test_plugins_of_one_load_are_unknown_to_the_next(folder: Path) -> None:
    seen = []

    class Watching:
        @hookimpl
        def postprocess_model(self, model: torch.nn.Module) -> None:
            seen.append(model)

    model = load(folder, plugins=[Watching()])
    load(folder)
    assert seen == [model]
