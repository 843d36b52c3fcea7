"""Installs a wheel as a user would and checks that it is fast and right.

    python tools/check_wheel.py dist/zo_fused-*.whl [TORCH...]

For each version of torch (default: that of constraints.txt) a new environment of this Python, away
from the sources: the extension loads, serves the CPU, and steps have the bits of the reference.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from set_up import pins

CHECK = """
import torch, zo_fused
from zo_fused.sweeps.backends import cpu

assert zo_fused.backend_of("cpu") == "cpu", cpu.why_not("cpu")

def trained(backend, method):
    zo_fused.set_backend(backend)
    generator = torch.Generator().manual_seed(1)
    weight = torch.nn.Parameter(torch.randn(33, 65, generator=generator, dtype=torch.float16))
    optimizer = method([weight], lr=1e-3, eps=1e-2, seed=7)
    losses = [optimizer.step(lambda: (weight.float() ** 2).mean()) for _ in range(5)]
    return weight.detach(), torch.stack(losses)

for method in (zo_fused.MeZO, zo_fused.LOZO):
    for ours, reference in zip(trained("cpu", method), trained("reference", method)):
        assert torch.equal(ours, reference), method
print(f"torch {torch.__version__}, {cpu.isa()}: steps equal the reference in {zo_fused.__file__}")
"""


def check(wheel: Path, torch: str) -> None:
    """Raises CalledProcessError where the wheel can't be installed or is wrong."""
    # Neither this process's environment nor its directory may lend the sources.
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "ZO_FUSED"))}
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="zo-fused-wheel-") as folder:
        python = Path(folder, "bin", "python")
        pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "-q"]
        for command in (
            [sys.executable, "-m", "venv", folder],
            [*pip, "--only-binary=:all:", f"torch=={torch}", wheel.resolve()],
            [python, "-c", CHECK],
        ):
            subprocess.run(command, check=True, cwd=folder, env=clean)
    print(f"{wheel.name} works with torch {torch} ({time.monotonic() - start:.0f} s)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("torch", nargs="*", default=[pins()["torch"]], help="versions")
    args = parser.parse_args()
    for torch in args.torch:
        check(args.wheel, torch)


if __name__ == "__main__":
    main()
