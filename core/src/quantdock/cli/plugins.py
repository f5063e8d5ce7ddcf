"""``quantdock plugins``: what is installed, and what the policy says about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantdock.cli import output
from quantdock.cli.command import JsonOption

if TYPE_CHECKING:
    from quantdock.discovery import Offer
    from quantdock.policy import Policy


@dataclass(frozen=True, kw_only=True)
class _Listed:
    kind: str
    """``quantizer``, ``preset`` or ``stage``."""
    name: str
    distribution: str
    version: str
    allowed: bool
    reason: str
    claimed_by: list[str]
    """Other distributions that offer the same name; the policy has to choose one."""
    value: str
    """What is imported when a load needs it."""


# There is no --policy here: an option that takes a value makes Typer import a library that costs more time than the
# whole listing, which is meant to be instant.
def run(as_json: JsonOption = False) -> None:
    """List the installed quantizers, presets and stages, from package metadata; no plugin is imported.

    To try a policy out, set QUANTDOCK_POLICY to its path.
    """
    from quantdock.discovery import installed
    from quantdock.policy import Policy

    in_force = Policy.in_force(None)
    listed = _listed(installed(), in_force)
    if as_json:
        output.print_json({"policy": in_force.origin, "plugins": [dataclasses.asdict(one) for one in listed]})
        return
    rows = [
        (one.kind, one.name, one.distribution, one.version, "allowed" if one.allowed else "refused", _reason(one))
        for one in listed
    ]
    console = output.console()
    console.print(output.table(("kind", "name", "distribution", "version", "policy", "reason"), rows))
    console.print(output.facts([("policy", in_force.origin)]))


def _listed(offers: Sequence[Offer], policy: Policy) -> list[_Listed]:
    from quantdock.discovery import GROUPS, Catalog

    decisions = {decision.dist: decision for decision in Catalog(offers, policy).decisions}
    owners: dict[tuple[str, str], list[str]] = {}
    for offer in offers:
        owners.setdefault((offer.group, offer.name), []).append(offer.dist)
    return [
        _Listed(
            kind=offer.group.rpartition(".")[2].removesuffix("s"),
            name=offer.name,
            distribution=offer.dist,
            version=offer.version,
            allowed=decisions[offer.dist].allowed,
            reason=decisions[offer.dist].reason,
            claimed_by=[dist for dist in owners[offer.group, offer.name] if dist != offer.dist],
            value=offer.value,
        )
        for offer in sorted(offers, key=lambda offer: (GROUPS.index(offer.group), offer.name, offer.dist))
    ]


def _reason(one: _Listed) -> str:
    return one.reason + (f"; {one.name} is claimed by {', '.join(one.claimed_by)} too" if one.claimed_by else "")
