"""What a machine's owner allows, and that nothing else runs, whoever asks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import quantdock
from quantdock import PolicyError, QuantdockError, UnknownMethodError, hookimpl
from quantdock.config import ModelConfig
from quantdock.policy import Policy
from quantdock.testing import SmallModel, installed_plugin, write_checkpoint


def policy(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture(autouse=True)
def _no_policy_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QUANTDOCK_POLICY", raising=False)


# Rules ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "dist", "version", "allowed", "reason"),
    [
        ("", "a-plugin", "1.0", True, "default = 'allow'"),
        ('[plugins]\ndefault = "deny"', "a-plugin", "1.0", False, "default = 'deny'"),
        ('[plugins]\ndefault = "deny"\nallow = ["a-plugin"]', "a-plugin", "1.0", True, "allowed as 'a-plugin'"),
        ('[plugins]\ndefault = "deny"\nallow = ["A_Plugin"]', "a-plugin", "1.0", True, "allowed as 'A_Plugin'"),
        ('[plugins]\nallow = ["a-plugin<2"]', "a-plugin", "1.9", True, "allowed as 'a-plugin<2'"),
        ('[plugins]\nallow = ["a-plugin<2"]', "a-plugin", "2.0", False, "2.0 isn't within 'a-plugin<2'"),
        ('[plugins]\nallow = ["a-plugin>=1,<2"]', "a-plugin", "1.5rc1", True, "allowed as"),
        ('[plugins]\nallow = ["a-plugin<1", "a-plugin>=2"]', "a-plugin", "2.1", True, "allowed as 'a-plugin>=2'"),
        ('[plugins]\ndeny = ["a-plugin"]', "a-plugin", "1.0", False, "denied as 'a-plugin'"),
        ('[plugins]\ndeny = ["a-plugin==1.3"]', "a-plugin", "1.3", False, "denied as 'a-plugin==1.3'"),
        ('[plugins]\ndeny = ["a-plugin==1.3"]', "a-plugin", "1.4", True, "default = 'allow'"),
        ('[plugins]\nallow = ["a-plugin"]\ndeny = ["a-plugin"]', "a-plugin", "1.0", False, "denied as 'a-plugin'"),
        ('[plugins]\ndeny = ["b-plugin"]', "a-plugin", "1.0", True, "default = 'allow'"),
    ],
)
def test_verdicts(tmp_path: Path, text: str, dist: str, version: str, allowed: bool, reason: str) -> None:
    decision = Policy.in_force(policy(tmp_path / "policy.toml", text)).decide(dist, version)
    assert (decision.allowed, decision.dist, decision.version) == (allowed, dist, version)
    assert reason in decision.reason
    assert str(tmp_path / "policy.toml") in decision.reason


def test_without_a_policy_everything_installed_is_allowed() -> None:
    in_force = Policy.in_force(None)
    assert in_force.decide("a-plugin", "1.0").allowed
    assert in_force.allows_remote_code
    assert in_force.origin == "no policy"


def test_both_the_environment_and_the_argument_must_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strict = policy(tmp_path / "strict.toml", '[plugins]\ndefault = "deny"\n[code]\nremote = "deny"')
    mild = policy(tmp_path / "mild.toml", '[plugins]\nallow = ["a-plugin"]')
    monkeypatch.setenv("QUANTDOCK_POLICY", str(strict))
    in_force = Policy.in_force(mild)
    assert not in_force.decide("a-plugin", "1.0").allowed
    assert not in_force.allows_remote_code
    assert str(strict) in in_force.origin
    assert str(mild) in in_force.origin
    monkeypatch.setenv("QUANTDOCK_POLICY", str(mild))
    assert not Policy.in_force(strict).decide("a-plugin", "1.0").allowed
    assert Policy.in_force(mild).decide("a-plugin", "1.0").allowed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[plugins", "not valid TOML"),
        ('[plugin]\ndefault = "deny"', "plugin is not known; known: choose, code, plugins"),
        ('[plugins]\ndefualt = "deny"', "plugins.defualt is not known; known: plugins.allow, plugins.default"),
        ('[code]\nremtoe = "deny"', "code.remtoe is not known; known: code.remote"),
        ('[plugins]\ndefault = "none"', 'plugins.default = \'none\', expected "allow" or "deny"'),
        ("[plugins]\ndefault = false", "plugins.default = False, expected"),
        ("[code]\nremote = true", "code.remote = True, expected"),
        ('[plugins]\nallow = "a-plugin"', "plugins.allow = 'a-plugin', expected a list"),
        ('[plugins]\nallow = ["a plugin !"]', "plugins.allow: "),
        ('plugins = "deny"', r"plugins is str, expected a table \[plugins\]"),
    ],
)
def test_a_policy_that_cannot_be_read_as_meant_stops_every_load(folder: Path, text: str, message: str) -> None:
    path = policy(folder.parent / "policy.toml", text)
    with pytest.raises(PolicyError, match=message) as error:
        quantdock.load(folder, model=SmallModel, policy=path)
    assert str(path) in str(error.value)


def test_a_policy_that_is_missing_stops_every_load(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = folder / "policy.toml"
    with pytest.raises(PolicyError, match=r"can't be read .*nothing is loaded without it"):
        quantdock.load(folder, model=SmallModel, policy=missing)
    monkeypatch.setenv("QUANTDOCK_POLICY", str(missing))
    with pytest.raises(PolicyError, match="can't be read"):
        quantdock.load(folder, model=SmallModel)
    with pytest.raises(PolicyError, match="can't be read"):
        quantdock.quantizers()


def test_remote_code_can_be_forbidden(folder: Path) -> None:
    path = policy(folder.parent / "policy.toml", '[code]\nremote = "deny"')
    with pytest.raises(PolicyError, match="trust_remote_code=True is forbidden by"):
        quantdock.load(folder, model=SmallModel, policy=path, trust_remote_code=True)
    quantdock.load(folder, model=SmallModel, policy=path)


# Nothing that is refused runs -------------------------------------------------------------------------------------


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """A plugin that offers all it can, and the file that importing it makes; it is at fault when the file exists."""
    marker = tmp_path / "imported"
    source = f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"
    entry_points = {
        "quantdock.quantizers": {"sly": "sly_plugin:Quantizer"},
        "quantdock.presets": {"sly-int8": "sly_plugin:INT8"},
        "quantdock.stages": {"sly": "sly_plugin:Stage"},
    }
    with installed_plugin(
        tmp_path,
        dist="sly-plugin",
        entry_points=entry_points,
        modules={"sly_plugin": source, "sly_plugin.part": source},
    ):
        yield marker


@pytest.fixture
def denied(tmp_path: Path) -> Path:
    return policy(tmp_path / "policy.toml", '[plugins]\ndeny = ["sly-plugin"]')


def quantized(folder: Path, config: object) -> None:
    """Write ``config`` as the checkpoint's ``quantization_config``."""
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(data | {"quantization_config": config}))


class Asks:
    """A plugin object of the load that asks for the refused method, through the config that it makes."""

    @hookimpl
    def resolve_config(self) -> ModelConfig:
        data = {"features": 64, "dtype": "bfloat16", "quantization_config": {"quant_method": "sly"}}
        return ModelConfig(data=data, origin="a plugin")


@pytest.mark.parametrize(
    "options",
    [
        {"quantize": "sly-int8"},
        {"quantize": {"quant_method": "sly"}},
        {"quantize": {"blocks.0": "sly-int8", "*": None}},
        {"plugins": [Asks()]},
        {"config_overrides": {"quantization_config": {"quant_method": "sly"}}},
    ],
    ids=["preset", "method", "pattern", "plugin", "override"],
)
def test_what_is_refused_is_never_imported(
    folder: Path, marker: Path, denied: Path, options: dict[str, object]
) -> None:
    with pytest.raises(PolicyError, match=r"'sly(-int8)?' is offered by sly-plugin 1.0, which the policy refuses"):
        quantdock.load(folder, model=SmallModel, policy=denied, **options)  # type: ignore[arg-type]
    assert not marker.exists()


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "sly"},
        {"quant_method": "quantdock", "parts": [{"patterns": ["*"], "config": {"quant_method": "sly"}}]},
    ],
    ids=["alone", "mixed"],
)
def test_what_a_checkpoint_asks_for_is_not_imported_either(
    folder: Path, marker: Path, denied: Path, config: object
) -> None:
    quantized(folder, config)
    with pytest.raises(PolicyError, match=r"'sly' is offered by sly-plugin 1\.0, which the policy refuses"):
        quantdock.load(folder, model=SmallModel, policy=denied)
    assert not marker.exists()


@pytest.mark.parametrize("method", ["sly_plugin:Quantizer", "sly_plugin", "sly-plugin", "../sly", "SLY", ""])
def test_a_checkpoint_cannot_name_code(folder: Path, marker: Path, denied: Path, method: str) -> None:
    quantized(folder, {"quant_method": method})
    with pytest.raises(UnknownMethodError, match="no installed plugin serves quant_method"):
        quantdock.load(folder, model=SmallModel, policy=denied)
    assert not marker.exists()


def test_loads_that_need_nothing_refused_say_what_was(folder: Path, marker: Path, denied: Path) -> None:
    report = quantdock.report(quantdock.load(folder, model=SmallModel, policy=denied))
    assert report.refused == {"sly-plugin": f"denied as 'sly-plugin' by {denied}"}
    assert "sly-plugin" not in report.plugins
    assert report.policy == str(denied)
    assert not marker.exists()


def test_what_is_refused_is_not_listed(marker: Path, denied: Path) -> None:
    assert "sly" in quantdock.quantizers()
    assert "sly" not in quantdock.quantizers(policy=denied)
    assert "sly-int8" not in quantdock.presets(policy=denied)
    assert not marker.exists()


def test_the_environment_binds_a_load_that_names_no_policy(
    folder: Path, marker: Path, denied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTDOCK_POLICY", str(denied))
    with pytest.raises(PolicyError, match="which the policy refuses"):
        quantdock.load(folder, model=SmallModel, quantize="sly-int8")
    quantdock.load(folder, model=SmallModel)
    assert not marker.exists()


def test_allowing_it_imports_it(folder: Path, marker: Path) -> None:
    with pytest.raises(QuantdockError, match="sly_plugin:INT8 failed: AttributeError"):
        quantdock.load(folder, model=SmallModel, quantize="sly-int8")
    assert marker.exists(), "the test's own premise"
