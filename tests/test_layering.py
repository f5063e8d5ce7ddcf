"""Taste, made executable: what the core's source may say and import, beside the import contracts."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

CORE = Path(__file__).parents[1] / "core" / "src" / "quantdock"
MODULES = sorted(CORE.rglob("*.py"))
BACKENDS = {
    *("bitsandbytes", "bnb", "gptq", "awq", "torchao", "quanto", "hqq", "gguf", "ggml", "marlin", "exllama"),
    *("nf4", "fp4", "autoround"),
}
FAMILIES = {"llama", "qwen", "mistral", "mixtral", "gemma", "gpt2", "bert", "deepseek", "falcon", "mamba", "t5"}

# Imported where they are needed, for a reason: each costs time that most uses of the core don't have to pay.
HEAVY = {
    "accelerate",
    "huggingface_hub",
    "rich",
    "safetensors",
    "packaging",
    "concurrent",
    "inspect",
    "resource",
    "sys",
}


def code_words(tree: ast.AST) -> set[str]:
    """Words of names and of strings that aren't docstrings."""
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    docs |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found: set[str] = set()
    for node in ast.walk(tree):
        texts = [getattr(node, field, None) for field in ("id", "attr", "name", "arg", "module")]
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            texts.append(node.value)
        for text in texts:
            if isinstance(text, str):
                found |= set(re.findall(r"[a-z0-9]+", text.lower()))
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(CORE)))
def test_core_names_no_backend_and_no_model_family(path: Path) -> None:
    if path.name == "auto.py":
        pytest.skip("spells out transformers' from_pretrained, whose arguments name backends")
    words = code_words(ast.parse(path.read_text(encoding="utf-8")))
    assert not words & (BACKENDS | FAMILIES)


IMPORTED_LATE = {
    ("registry.py", "quantdock.quantizer"),  # listing plugins must not
    ("calls.py", "quantdock.loading"),  # a load says what it waits for first
    ("triton_form.py", "quantdock.linears.triton_product"),  # imports Triton, which isn't everywhere
}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(CORE)))
def test_core_imports_lazily_only_what_is_heavy(path: Path) -> None:
    if {"cli", "testing"} & set(path.relative_to(CORE).parts):
        pytest.skip("commands and test helpers import what they use when they run")
    for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(function, ast.FunctionDef):
            continue
        for node in ast.walk(function):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                if (path.name, name) in IMPORTED_LATE:
                    continue
                assert name.partition(".")[0] in HEAVY, f"{path.name}: {function.name} imports {name}"


def test_loading_is_one_page() -> None:
    """The flow is readable in one go: the function that runs the stages calls them in the design's order."""
    tree = ast.parse((CORE / "loading.py").read_text(encoding="utf-8"))
    flow = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "make_plan")
    calls = sorted(
        (node.lineno, node.attr)
        for node in ast.walk(flow)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute) and node.value.attr == "hook"
    )
    assert [name for _, name in calls] == ["resolve_config", "find_checkpoints", "build_model"]
