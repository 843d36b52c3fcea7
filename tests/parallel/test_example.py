"""The script of examples/parallel by torchrun, as docs/parallel.md has it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import zo_fused

pytestmark = pytest.mark.slow  # processes that import torch

ROOT = Path(__file__).parents[2]
COMMANDS = re.findall(
    r"^torchrun (.*examples/parallel.*)$", (ROOT / "docs/parallel.md").read_text(), re.MULTILINE
)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_script_gives_all_ranks_the_weights_of_its_log(command: str, tmp_path: Path) -> None:
    words = shlex.split(command.replace("examples/", f"{ROOT}/examples/"), comments=True)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", *words]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, *others = (torch.load(file) for file in sorted(tmp_path.glob("weights-*.pt")))
    assert f"--nproc-per-node={1 + len(others)}" in words
    for weights in others:
        assert all(torch.equal(weights[name], w) for name, w in first.items())
    losses = [float(loss) for loss in re.findall(r"loss ([0-9.]+)", done.stdout)]
    assert losses[-1] < 0.8 * losses[0]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    zo_fused.replay(model, tmp_path / "replay.jsonl")
    assert all(torch.equal(first[name], w) for name, w in model.state_dict().items())


def test_there_are_commands() -> None:
    assert len(COMMANDS) == 2
