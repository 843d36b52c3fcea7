"""Scripts on several processes, by torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def by_torchrun(
    script: str, directory: Path, processes: int = 2
) -> subprocess.CompletedProcess[str]:
    """With gloo on the CPU."""
    (directory / "script.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command.append(f"--nproc-per-node={processes}")
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    return subprocess.run(
        [*command, "script.py"], cwd=directory, env=environment, capture_output=True, text=True
    )
