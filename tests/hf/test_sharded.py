"""Models that transformers or accelerate shard, in two processes: `support.sharded_trainers`."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import sharded_trainers
from support.torchrun import by_torchrun

pytestmark = pytest.mark.slow  # two processes import transformers


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One start for all checks."""
    folder = tmp_path_factory.mktemp("sharded")
    script = "from support.sharded_trainers import main\nmain()\n"
    (folder / "output").write_text(by_torchrun(script, folder).stderr)
    return folder


@pytest.mark.parametrize("name", sharded_trainers.CHECKS)
def test_two_processes(made: Path, name: str) -> None:
    for rank in range(2):
        file = made / f"{name}.{rank}"
        assert file.exists(), f"process {rank} did not come so far\n{made / 'output'}"
        assert not file.read_text(), file.read_text()
