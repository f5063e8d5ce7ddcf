"""Which file of a source is the GGUF file, and the other files of a model that was split."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quantdock import CheckpointError, LoadOptions, Source, SourceError

if TYPE_CHECKING:
    from quantdock_gguf.header import Header

SUFFIX = ".gguf"
CHOICE = "gguf_file"
"""The key of ``load(..., extras={"gguf_file": NAME})``; transformers has an argument of this name."""
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>(?!0{5})\d{5})\.gguf")


def chosen_file(source: Source, options: LoadOptions) -> str | None:
    """The name of the GGUF file to load, ``None`` when the source isn't one.

    A file that was named is taken; of a folder or repository without ``config.json``, its only GGUF file. The first
    part stands for all parts of a split model.

    Raises:
        SourceError: there are several to choose from, or the one that was named doesn't exist.
    """
    named = options.extras.get(CHOICE)
    if source.single_file is not None:
        if named is None and source.single_file.suffix == SUFFIX:
            named = source.single_file.name
        if named is None:
            return None
    if named is not None:
        return _first_part(str(named))
    if source.find("config.json") is not None:
        return None
    found = sorted({_first_part(name) for name in source.listing() if name.endswith(SUFFIX)})
    if len(found) > 1:
        raise SourceError(
            f"{source.name}: has no config.json and {len(found)} GGUF files ({', '.join(found)}). Say which: "
            f"extras={{{CHOICE!r}: {found[0]!r}}}, {CHOICE}= in from_pretrained, or the path of the file if it is local"
        )
    return found[0] if found else None


def all_parts(source: Source, name: str) -> list[Path]:
    """Local paths of the file and, if its name says that it is a part, of all parts in order.

    Raises:
        SourceError: one isn't there.
        CheckpointError: one leads out of the source.
    """
    match = _PART.fullmatch(name)
    names = [name]
    if match is not None:
        names = [_part(match["stem"], number + 1, match["count"]) for number in range(int(match["count"]))]
    # A name can claim any number of parts: ask for all of them only if the last one exists.
    found = source.fetch(names) if source.find(names[-1]) is not None else {}
    if missing := [name for name in names if name not in found]:
        of = f", one of {len(names)} parts of a split model" if len(names) > 1 else ""
        raise SourceError(f"{source.name}: there is no {missing[0] if found else names[-1]}{of}")
    for path in found.values():
        if not source.is_inside(path):
            raise CheckpointError(f"leads out of the source {source.name}", file=path)
    return [found[name] for name in names]


def check_parts(headers: Sequence[Header]) -> None:
    """Whether the parts are those of one model, all of them, and give every tensor once.

    Raises:
        CheckpointError: they are not.
    """
    seen: dict[str, Path] = {}
    for index, header in enumerate(headers):
        number, count = (header.metadata.get(key, default) for key, default in (("split.no", 0), ("split.count", 1)))
        if (number, count) != (index, len(headers)) and (count or len(headers) > 1):
            raise CheckpointError(
                f"says that it is part {number} (counted from 0) of {count}; by the names of the files it is part "
                f"{index} of {len(headers)}",
                file=header.file,
            )
        for info in header.tensors:
            if info.name in seen:
                raise CheckpointError(f"is in {seen[info.name]} too", file=header.file, tensor=info.name)
            seen[info.name] = header.file
    total = headers[0].metadata.get("split.tensors.count", len(seen))
    if total != len(seen):
        raise CheckpointError(f"says that the model has {total} tensors; {len(seen)} are there", file=headers[0].file)


def _first_part(name: str) -> str:
    match = _PART.fullmatch(name)
    return name if match is None else _part(match["stem"], 1, match["count"])


def _part(stem: str, number: int, count: str) -> str:
    return f"{stem}-{number:05d}-of-{count}{SUFFIX}"
