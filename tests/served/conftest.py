from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from serving import client_of, load_engine, make_checkpoint

from understudy.serve.engine import Engine


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def engine(checkpoint: Path) -> Engine:
    return load_engine(checkpoint)


@pytest.fixture(scope="session")
def client(engine: Engine) -> Iterator[httpx2.Client]:
    with client_of(engine, max_logprobs=-1) as client:
        yield client
