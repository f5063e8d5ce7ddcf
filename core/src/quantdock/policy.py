"""What this machine's owner allows, decided from package metadata before any plugin is imported.

A policy is a TOML file that ``QUANTDOCK_POLICY`` or ``policy=`` names; when both do, both must agree to a plugin::

    [plugins]
    default = "deny"                              # or "allow"
    allow = ["quantdock-transformers", "quantdock-bnb>=0.1,<1"]
    deny = []                                     # wins over allow

    [code]
    remote = "deny"                               # forbid trust_remote_code=True

    [choose]
    bitsandbytes = "quantdock-bnb"                # who serves a name that two distributions claim
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantdock.discovery import Decision, canonical
from quantdock.errors import PolicyError

if TYPE_CHECKING:
    from packaging.requirements import Requirement

ENVIRONMENT = "QUANTDOCK_POLICY"


@dataclass(frozen=True, kw_only=True)
class _Rules:
    origin: str
    default: str
    allow: tuple[Requirement, ...]
    deny: tuple[Requirement, ...]
    remote_code: bool
    choices: Mapping[str, str]

    def decide(self, dist: str, version: str) -> tuple[bool, str]:
        for requirement in self.deny:
            if canonical(requirement.name) == dist and requirement.specifier.contains(version, prereleases=True):
                return False, f"denied as {str(requirement)!r} by {self.origin}"
        named = [requirement for requirement in self.allow if canonical(requirement.name) == dist]
        for requirement in named:
            if requirement.specifier.contains(version, prereleases=True):
                return True, f"allowed as {str(requirement)!r} by {self.origin}"
        if named:
            return False, f"{version} isn't within {str(named[0])!r} of {self.origin}"
        return self.default == "allow", f"default = {self.default!r} of {self.origin}"


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The rules in force; with none, everything that is installed is allowed."""

    rules: tuple[_Rules, ...] = field(default=())

    @property
    def origin(self) -> str:
        """Where the rules come from."""
        return " and ".join(rules.origin for rules in self.rules) or "no policy"

    @property
    def allows_remote_code(self) -> bool:
        """Whether ``trust_remote_code=True`` may be used."""
        return all(rules.remote_code for rules in self.rules)

    @property
    def choices(self) -> Mapping[str, str]:
        """Name -> the distribution that serves it where several claim it."""
        return {name: dist for rules in self.rules for name, dist in rules.choices.items()}

    def decide(self, dist: str, version: str) -> Decision:
        """Whether a plugin's code may run."""
        verdicts = [rules.decide(dist, version) for rules in self.rules]
        refused = [reason for allowed, reason in verdicts if not allowed]
        reasons = refused or [reason for _, reason in verdicts] or ["no policy"]
        return Decision(dist=dist, version=version, allowed=not refused, reason="; ".join(reasons))

    @classmethod
    def in_force(cls, path: str | os.PathLike[str] | None) -> Policy:
        """The policy of the environment and the one an argument names.

        Raises:
            PolicyError: a file can't be read or says something that isn't known.
        """
        named = [value for value in (os.environ.get(ENVIRONMENT), path) if value]
        return cls(
            rules=tuple(_read(Path(value).expanduser()) for value in dict.fromkeys(os.fspath(value) for value in named))
        )


def _read(path: Path) -> _Rules:
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PolicyError(f"policy {path}: can't be read ({error.strerror}); nothing is loaded without it") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PolicyError(f"policy {path}: not valid TOML: {error}") from error
    _known(path, "", data, {"plugins", "code", "choose"})
    plugins, code, choose = (_table(path, data, key) for key in ("plugins", "code", "choose"))
    _known(path, "plugins.", plugins, {"default", "allow", "deny"})
    _known(path, "code.", code, {"remote"})
    default = _one_of(path, "plugins.default", plugins.get("default", "allow"))
    return _Rules(
        origin=str(path),
        default=default,
        allow=_requirements(path, "plugins.allow", plugins.get("allow", [])),
        deny=_requirements(path, "plugins.deny", plugins.get("deny", [])),
        remote_code=_one_of(path, "code.remote", code.get("remote", "allow")) == "allow",
        choices={name: canonical(str(dist)) for name, dist in choose.items()},
    )


def _table(path: Path, data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    table = data.get(key, {})
    if not isinstance(table, dict):
        raise PolicyError(f"policy {path}: {key} is {type(table).__name__}, expected a table [{key}]")
    return table


def _known(path: Path, prefix: str, data: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(data.keys() - known)
    if unknown:
        # A rule that is misspelt would not be enforced; better no load than an unguarded one.
        raise PolicyError(
            f"policy {path}: {', '.join(prefix + key for key in unknown)} is not known; known: "
            f"{', '.join(prefix + key for key in sorted(known))}"
        )


def _one_of(path: Path, key: str, value: object) -> str:
    if value not in ("allow", "deny"):
        raise PolicyError(f'policy {path}: {key} = {value!r}, expected "allow" or "deny"')
    return str(value)


def _requirements(path: Path, key: str, values: object) -> tuple[Requirement, ...]:
    from packaging.requirements import InvalidRequirement, Requirement

    if not isinstance(values, list):
        raise PolicyError(f'policy {path}: {key} = {values!r}, expected a list such as ["quantdock-NAME>=0.1,<1"]')
    try:
        return tuple(Requirement(str(value)) for value in values)
    except InvalidRequirement as error:
        raise PolicyError(f"policy {path}: {key}: {error}") from error
