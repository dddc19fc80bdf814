"""The real server that most tests of the service share."""

from __future__ import annotations

import pytest
from helpers.server import SERVE, bentoml_serve


@pytest.fixture(scope="session")
def samples(cells):
    """The folder of the page's sample images."""
    return cells / "test" / "defective"


@pytest.fixture(scope="session")
def server(bundle, samples, tmp_path_factory):
    """A BentoML server, whose processes must outlive every request, and whose log must show no traceback at the end."""
    environment = {"PATCHCORE_BUNDLE": str(bundle), "PATCHCORE_SAMPLES": str(samples), "PATCHCORE_MAX_BODY": "8"}
    with bentoml_serve(SERVE, tmp_path_factory.mktemp("serve"), **environment) as server:
        workers = {child.pid for child in server.children()}
        yield server
        assert {child.pid for child in server.children()} == workers, "a worker died"
        assert "Traceback" not in server.log.read_text(errors="replace")


@pytest.fixture
def client(server):
    """Its HTTP client."""
    return server.client
