"""Which modules compressed-tensors means: by name, by a regular expression for the start of a name, or by class."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from quantdock import ConfigError

_REGEX = "re:"


def check_patterns(where: str, items: Iterable[str]) -> None:
    """
    Raises:
        ConfigError: a regular expression isn't one.
    """
    for item in items:
        try:
            re.compile(item.removeprefix(_REGEX) if item.startswith(_REGEX) else "")
        except re.error as error:
            raise ConfigError(f"{where}: {item!r} is no regular expression ({error})") from error


def first_match(items: Iterable[str], names: Collection[str], classes: Collection[str]) -> str | None:
    """The item that decides about a module, as in compressed-tensors' ``match_targets``: names before regular
    expressions before classes, each in alphabetical order.

    Args:
        items: targets, or what is ignored.
        names: what the module is called; it may have another name in the checkpoint.
        classes: names of its class and those that it is derived from.
    """
    plain = frozenset(names)  # of experts, there may be hundreds
    ordered = sorted(items, key=lambda item: (_REGEX in item, item))
    by_name = (item for item in ordered if item in plain or (item.startswith(_REGEX) and _matches(item, names)))
    return next(by_name, None) or next((item for item in ordered if item in classes), None)


def _matches(item: str, names: Iterable[str]) -> bool:
    pattern = re.compile(item.removeprefix(_REGEX))
    return any(pattern.match(name) is not None for name in names)
