"""Fixtures that several test modules share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import quantdock

pytest_plugins = ["tests.hub_fixtures"]

TinyFactory = Callable[[str], Path]


@contextlib.contextmanager
def skipping_what_this_machine_lacks(preset: str) -> Iterator[None]:
    """For loads with presets that need a GPU or a compiler: without one, the test is skipped with their reason."""
    try:
        yield
    except (quantdock.UnsupportedError, quantdock.LedgerError, quantdock.LoadError) as error:
        if "cuda" in str(error).lower() or "compiler" in str(error).lower():
            pytest.skip(f"{preset} doesn't run here: {error}")
        raise


@pytest.fixture(scope="session", autouse=True)
def _quiet_transformers() -> Iterator[None]:
    """No bars and no network from the reference library; the environment is for subprocesses of tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRANSFORMERS_VERBOSITY", "error")
        patch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyFactory:
    """``tiny("llama")``: the folder of that architecture's tiny checkpoint, made once; treat it as read-only."""
    from tests.tiny_models import make_tiny

    root = tmp_path_factory.mktemp("tiny")
    made: dict[str, Path] = {}

    def get(model_type: str) -> Path:
        if model_type not in made:
            made[model_type] = make_tiny(model_type, root / model_type)
        return made[model_type]

    return get


@pytest.fixture
def tiny_copy(tiny: TinyFactory, tmp_path: Path) -> TinyFactory:
    """Like ``tiny``, but a copy that the test may damage."""
    import shutil

    def get(model_type: str) -> Path:
        return Path(shutil.copytree(tiny(model_type), tmp_path / model_type))

    return get


@pytest.fixture(autouse=True)
def _no_policy(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The machine's own policy must not decide a test, nor its result cache; and no test writes to that."""
    monkeypatch.delenv("QUANTDOCK_POLICY", raising=False)
    monkeypatch.delenv("QUANTDOCK_CACHE", raising=False)
    monkeypatch.setenv("QUANTDOCK_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "results"))
