"""The fixture `hub_server`. A test module has it after `pytest_plugins = ["tests.hub_fixtures"]`.

Clients in the test's own process have read `HF_ENDPOINT` when huggingface_hub was imported. They reach the server with
`endpoint=hub_server.endpoint`; code that takes no endpoint does when both `huggingface_hub.constants.ENDPOINT` and
`huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE` are patched, or in a process started with `HF_ENDPOINT` set.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.hub_server import HubServer, OlahUnavailableError, olah_environment, proxy_variables


@pytest.fixture(scope="session")
def hub_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """A running Hub without models, one for all tests of a process; each test adds models under names of its own.

    olah is installed once, into the folder that `QUANTDOCK_TEST_CACHE` names (else one in the system's folder for
    temporary files). From here to the end of the session, nothing in this process uses a proxy.
    """
    from huggingface_hub import close_session

    default = Path(tempfile.gettempdir(), "quantdock-tests")
    try:
        olah_cli = olah_environment(Path(os.environ.get("QUANTDOCK_TEST_CACHE") or default))
    except OlahUnavailableError as error:
        pytest.skip(f"no Hub server: {error}")
    with pytest.MonkeyPatch.context() as patch:
        for name in proxy_variables(os.environ):
            patch.delenv(name)
        close_session()  # huggingface_hub's client keeps the proxies that it was made with
        with HubServer(olah_cli, tmp_path_factory.mktemp("hub")) as server:
            yield server
            close_session()
