"""How much memory there is to plan with."""

from pathlib import Path

import pytest
import torch

from understudy.backends import memory
from understudy.backends.memory import _container_limit, memory_budget


def group(folder: Path, limit: str, stat: str = "anon 300\nfile 5000\nkernel 7\n") -> Path:
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.stat").write_text(stat)
    return folder


def test_a_containers_limit_less_what_cannot_be_let_go(tmp_path: Path) -> None:
    assert _container_limit(group(tmp_path, "1000")) == 700


def test_a_container_without_a_limit(tmp_path: Path) -> None:
    assert _container_limit(group(tmp_path, "max")) == float("inf")


@pytest.mark.parametrize("missing", ["memory.max", "memory.stat"])
def test_no_control_group(tmp_path: Path, missing: str) -> None:
    (group(tmp_path, "1000") / missing).unlink()
    assert _container_limit(tmp_path) == float("inf")
    assert _container_limit(tmp_path / "nowhere") == float("inf")


def test_the_budget_is_a_share_of_the_smaller_number(monkeypatch: pytest.MonkeyPatch) -> None:
    available = memory.psutil.virtual_memory()._replace(available=1_000_000)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: available)
    for limit, budget in ((float("inf"), 700_000), (2_000_000, 700_000), (100_000, 70_000)):
        monkeypatch.setattr(memory, "_container_limit", lambda limit=limit: limit)
        assert memory_budget(torch.device("cpu")) == pytest.approx(budget, abs=1)


def test_here_there_is_some() -> None:
    budget = memory_budget(torch.device("cpu"))
    assert 0 < budget < memory.psutil.virtual_memory().total


def test_on_a_gpu_what_is_free_and_what_torch_holds_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9999))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 600)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)
    assert memory_budget(torch.device("cuda")) == pytest.approx(0.7 * (1000 + 400), abs=1)
