"""What the documents say is executed or compared, so that it can't rot."""

from __future__ import annotations

import inspect
import re
import shutil
from pathlib import Path

import pytest
from tests.conftest import TinyFactory
from tests.embedding import DOCUMENTS, ROOT, embedded

from quantdock import hookspecs

HOOKS = {name: value for name, value in vars(hookspecs).items() if hasattr(value, "quantdock_spec")}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_quoted_files_are_the_files(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert text == embedded(text), f"{document.name} quotes an older file; run python -m tests.embedding"


def test_every_hook_is_documented_under_its_exact_signature() -> None:
    text = (ROOT / "docs" / "hooks.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## `(\w+)(.*)`$", text, re.MULTILINE)
    assert headings == [(name, str(inspect.signature(hook)).replace("'", "")) for name, hook in HOOKS.items()]


@pytest.mark.parametrize("name", HOOKS)
def test_a_hooks_docstring_follows_the_schema(name: str) -> None:
    """When it is called, what to return, what None means, whether the first result decides, every argument."""
    hook = HOOKS[name]
    text = inspect.getdoc(hook) or ""
    assert "Called" in text
    assert ("First result." in text) == hook.quantdock_spec["firstresult"]
    if hook.quantdock_spec["firstresult"]:
        assert "Return" in text
        assert "``None``" in text
    else:
        assert "eturn values are ignored" in text
    for argument in inspect.signature(hook).parameters:
        assert re.search(rf"^    {argument}: ", text, re.MULTILINE), f"{argument} isn't documented"


@pytest.mark.parametrize("document", ["README.md", "docs/hooks.md"])
def test_python_blocks_run(document: str, tiny: TinyFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in one namespace, in a folder that holds the model they talk about."""
    text = (ROOT / document).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert blocks
    shutil.copytree(tiny("llama"), tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for index, block in enumerate(blocks):
        exec(compile(block, f"{document} block {index}", "exec"), namespace)
    if document == "README.md":
        assert (tmp_path / "my-model-nf4" / "model.safetensors").is_file()


def test_links_lead_somewhere() -> None:
    for document in [*DOCUMENTS, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]:
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text(encoding="utf-8")):
            if "://" not in link:
                assert (document.parent / link).exists(), f"{document.name} links to {link}"


def test_the_readme_lists_the_plugins_that_there_are() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = set(re.findall(r"^\| `(quantdock-[\w-]+)`", text, re.MULTILINE))
    there = {
        match[1]
        for path in (ROOT / "plugins").glob("*/pyproject.toml")
        if (match := re.search(r'^name = "(.+)"', path.read_text(encoding="utf-8"), re.MULTILINE))
    }
    assert table == there
