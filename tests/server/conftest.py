"""One server over a tiny model for all tests that do not break it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.served import Running, engine, model, running


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model(tmp_path_factory.mktemp("server") / "model")


@pytest.fixture(scope="session")
def served(folder: Path) -> Iterator[Running]:
    with running(engine(folder), max_body=4 << 20) as found:
        assert found.good()
        yield found
