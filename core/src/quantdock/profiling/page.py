"""The page of a recording: one file, nothing fetched, readable without scripts."""

from __future__ import annotations

import base64
import hashlib
import os
import tempfile
from importlib import resources
from pathlib import Path

from quantdock.errors import QuantdockError
from quantdock.profiling import sections
from quantdock.profiling.digest import Material, digest
from quantdock.profiling.markup import Markup, element, joined, json_block


def render(material: Material) -> str:
    """The page as text."""
    data = digest(material, brief=True)
    script, style = Markup(_asset("page.js")), Markup(_asset("page.css"))
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Names are escaped; should one slip through all the same, the browser runs this script and no other.
    security = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'; base-uri 'none'"
    title = f"{sections.title(data)}: profile of a load"
    head = element(
        "head",
        Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{security}">'),
        Markup('<meta name="color-scheme" content="light dark">'),
        element("title", title),
        element("style", style),
    )
    body = element(
        "body",
        sections.header(data),
        element("main", *sections.all_of(data, material)),
        json_block(data, id_="data"),
        element("script", script),
    )
    return joined(Markup("<!doctype html>\n"), element("html", head, body, lang="en"), Markup("\n"))


def write(material: Material, path: str | os.PathLike[str]) -> Path:
    """Write the page; the file appears whole, or not at all.

    Raises:
        QuantdockError: it can't be written.
    """
    target = Path(path).expanduser()
    text = render(material)
    try:
        descriptor, aside = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(aside, target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask())
            os.replace(aside, target)
        except BaseException:
            os.unlink(aside)
            raise
    except OSError as error:
        raise QuantdockError(f"{target}: the profile can't be written there ({error.strerror})") from error
    return target


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
