"""The healthy ledger world, made and looked at once; tests that change something copy it."""

from __future__ import annotations

from pathlib import Path

import pytest
from cases import ledger_config, ledger_world, look

from understudy.doctor.findings import Report


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ledger_world(tmp_path_factory.mktemp("ledger"))


@pytest.fixture(scope="session")
def healthy(world: Path) -> Report:
    return look(ledger_config(world))
