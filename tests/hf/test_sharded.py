"""Models that transformers or accelerate shard: `support.sharded_trainers`."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import sharded_trainers
from support.torchrun import by_torchrun

pytestmark = pytest.mark.slow  # they import transformers


def made_by(processes: int, factory: pytest.TempPathFactory) -> Path:
    """One start for all checks."""
    folder = factory.mktemp("sharded")
    script = "from support.sharded_trainers import main\nmain()\n"
    (folder / "output").write_text(by_torchrun(script, folder, processes).stderr)
    return folder


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_by(2, tmp_path_factory)


@pytest.fixture(scope="module")
def of_four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_by(4, tmp_path_factory)


def check_files(made: Path, name: str, processes: int) -> None:
    for rank in range(processes):
        file = made / f"{name}.{rank}"
        assert file.exists(), f"process {rank} did not come so far\n{made / 'output'}"
        assert not file.read_text(), file.read_text()


@pytest.mark.parametrize("name", sharded_trainers.CHECKS)
def test_two_processes(of_two: Path, name: str) -> None:
    check_files(of_two, name, 2)


@pytest.mark.parametrize("name", sharded_trainers.OF_FOUR)
def test_four_processes(of_four: Path, name: str) -> None:
    check_files(of_four, name, 4)
