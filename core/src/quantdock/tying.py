"""Tied parameters: which one is loaded, which share it, and what to do when a checkpoint stores several."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch

from quantdock.checkpoint import Checkpoint
from quantdock.conversion import Conversion
from quantdock.pagecache import release

_CHUNK = 1 << 22  # elements compared at a time


@dataclass(frozen=True, kw_only=True)
class TiedGroup:
    """Parameters that are one tensor: the source the architecture names, and those tied to it."""

    source: str
    targets: tuple[str, ...]

    @classmethod
    def of(cls, tied: Mapping[str, str]) -> list[TiedGroup]:
        """The groups of a ``{target: source}`` mapping."""
        groups: dict[str, list[str]] = defaultdict(list)
        for target, source in tied.items():
            groups[source].append(target)
        return [cls(source=source, targets=tuple(targets)) for source, targets in groups.items()]


@dataclass(kw_only=True)
class TieOutcome:
    """What becomes of a tied group."""

    tied: dict[str, str] = field(default_factory=dict)
    """Parameter -> the one it shares the tensor of."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Parameter whose stored copy isn't needed -> reason."""
    untied: dict[str, str] = field(default_factory=dict)
    """Parameter that keeps values of its own -> reason."""


def resolve_ties(
    group: TiedGroup, stored: Mapping[str, Conversion], quantized: Collection[str], checkpoint: Checkpoint
) -> TieOutcome:
    """Decide which member is loaded.

    The source if the checkpoint has it, else the first target that it has. A checkpoint may store several members:
    equal ones are tied, others are left as the checkpoint has them, as transformers does. To know, their values are
    compared, the only case in which planning reads weights. With none stored, every member is missing.
    """
    outcome = TieOutcome()
    members = (group.source, *group.targets)
    present = [name for name in members if name in stored or name in quantized]
    if not present:
        return outcome
    owner, stored_members = present[0], set(present)
    for name in members:
        if name == owner:
            continue
        if name not in stored_members:
            outcome.tied[name] = owner
        elif name in stored and owner in stored and _equal(stored[owner], stored[name], checkpoint):
            outcome.tied[name] = owner
            outcome.dropped[name] = f"the same values as {owner!r}, which it is tied to"
        else:
            outcome.untied[name] = f"stored with other values than {owner!r}, so it isn't tied"
    return outcome


def _equal(one: Conversion, other: Conversion, checkpoint: Checkpoint) -> bool:
    if not (one.is_rename and other.is_rename):
        return one.sources == other.sources
    left, right = (checkpoint.tensors[conversion.sources[0]] for conversion in (one, other))
    if left.spec != right.spec:
        return False
    a, b = left.read().flatten(), right.read().flatten()
    for start in range(0, a.numel(), _CHUNK):
        pieces = a[start : start + _CHUNK], b[start : start + _CHUNK]
        same = torch.equal(*pieces)
        if left.reader.maps:
            for piece in pieces:
                release(piece)
        if not same:
            return False
    return True
