"""Which plugins are installed, from package metadata alone: nothing is imported here but the one that is needed."""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import importlib_metadata

from quantdock.errors import PluginConflictError, PluginError, PolicyError

if TYPE_CHECKING:
    from quantdock.policy import Policy

QUANTIZERS = "quantdock.quantizers"
PRESETS = "quantdock.presets"
CONFIGS = "quantdock.configs"
STAGES = "quantdock.stages"
GROUPS = (QUANTIZERS, PRESETS, CONFIGS, STAGES)

logger = logging.getLogger("quantdock")


@dataclass(frozen=True, kw_only=True)
class Offer:
    """One entry point of one distribution."""

    group: str
    name: str
    value: str
    """``module:attribute``."""
    dist: str
    version: str

    @property
    def origin(self) -> str:
        """For messages: ``quantdock-bnb 0.1.0``."""
        return f"{self.dist} {self.version}"

    def load(self) -> object:
        """Import what the entry point names.

        Raises:
            PluginError: the import fails, or the module has no such attribute; names the distribution.
        """
        entry = importlib_metadata.EntryPoint(name=self.name, value=self.value, group=self.group)
        try:
            return entry.load()
        except Exception as error:
            raise PluginError(
                f"{self.origin} offers {self.name!r} ({self.group}), but importing {self.value} failed: "
                f"{type(error).__name__}: {error}. Reinstall or remove it: pip uninstall {self.dist}"
            ) from error


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What the policy said about one distribution."""

    dist: str
    version: str
    allowed: bool
    reason: str


class Catalog:
    """The offers of all installed distributions, the policy applied. Made anew for each load."""

    def __init__(self, offers: Iterable[Offer], policy: Policy) -> None:
        self.decisions: list[Decision] = []
        allowed: dict[str, bool] = {}
        self._offers: list[Offer] = []
        self._refused: list[Offer] = []
        for offer in offers:
            if offer.dist not in allowed:
                decision = policy.decide(offer.dist, offer.version)
                self.decisions.append(decision)
                allowed[offer.dist] = decision.allowed
                logger.log(
                    logging.DEBUG if decision.allowed else logging.INFO,
                    "plugin %s %s: %s (%s)",
                    decision.dist,
                    decision.version,
                    "allowed" if decision.allowed else "refused",
                    decision.reason,
                )
            (self._offers if allowed[offer.dist] else self._refused).append(offer)
        self._policy = policy
        self.broken: dict[str, str] = {}
        """Distributions whose stage plugin can't be imported -> why."""

    @property
    def policy_origin(self) -> str:
        """Where the policy in force comes from."""
        return self._policy.origin

    def offers(self, group: str) -> list[Offer]:
        """The allowed offers of one group, by name."""
        return sorted((offer for offer in self._offers if offer.group == group), key=lambda offer: offer.name)

    def find(self, group: str, name: str) -> Offer | None:
        """The one distribution that offers ``name``.

        Raises:
            PluginConflictError: several do and the policy picks none.
            PolicyError: the only ones that do are refused.
        """
        found = [offer for offer in self.offers(group) if offer.name == name]
        if len(found) > 1:
            found = self._picked(group, name, found)
        if not found:
            refused = [offer for offer in self._refused if offer.group == group and offer.name == name]
            if refused:
                raise PolicyError(
                    f"{name!r} is offered by {_listed(refused)}, which the policy refuses ({self._policy.origin}). "
                    "Allow the distribution there, or choose another method."
                )
            return None
        return found[0]

    def stages(self) -> list[Offer]:
        """The allowed stage plugins.

        Raises:
            PluginConflictError: two distributions use the same name.
        """
        offers = self.offers(STAGES)
        names = [offer.name for offer in offers]
        result = []
        for name in dict.fromkeys(names):
            same = [offer for offer in offers if offer.name == name]
            result += self._picked(STAGES, name, same) if len(same) > 1 else same
        return result

    def _picked(self, group: str, name: str, offers: Sequence[Offer]) -> list[Offer]:
        choice = self._policy.choices.get(name)
        picked = [offer for offer in offers if offer.dist == choice]
        if len(picked) == 1:
            return picked
        raise PluginConflictError(
            f"{name!r} ({group}) is claimed by {_listed(offers)}. Uninstall all but one, or pick one in the policy: "
            f'[choose] "{name}" = "{offers[0].dist}"'
        )


def _listed(offers: Sequence[Offer]) -> str:
    return " and ".join(offer.origin for offer in offers)


def installed() -> tuple[Offer, ...]:
    """Every offer of every installed distribution, read from metadata; imports no plugin.

    Read anew when a folder of the import path has changed, which installing and uninstalling does.
    """
    return _scanned(tuple((path, _changed(path)) for path in sys.path))


def _changed(path: str) -> int:
    try:
        return os.stat(path or ".").st_mtime_ns
    except OSError:
        return 0


@functools.lru_cache(maxsize=4)
def _scanned(_: tuple[tuple[str, int], ...]) -> tuple[Offer, ...]:
    offers: list[Offer] = []
    seen: set[str] = set()
    for distribution in importlib_metadata.distributions():
        entries = [entry for entry in distribution.entry_points if entry.group in GROUPS]
        if not entries:
            continue
        name = canonical(distribution.name)
        if name in seen:  # the same distribution seen twice on sys.path: the first wins, as for imports
            continue
        seen.add(name)
        offers += [
            Offer(group=entry.group, name=entry.name, value=entry.value, dist=name, version=distribution.version)
            for entry in entries
        ]
    return tuple(offers)


@functools.lru_cache(maxsize=256)
def canonical(name: str) -> str:
    """A distribution's name in its normal form (PEP 503)."""
    from packaging.utils import canonicalize_name

    return str(canonicalize_name(name))
