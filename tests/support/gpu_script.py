"""What tests of `bench.gpu` share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from zo_fused.sweeps import dispatch

ROOT = Path(__file__).parents[2]
RESULTS = {"gpu.json", "gpu.md", "sweeps.png", "steps.png"}

native = pytest.mark.skipif(
    dispatch.why_not("cpu", "cpu") is not None, reason="the C++ extension is not built"
)


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "OUT")}
    return {**kept, "CUDA_VISIBLE_DEVICES": "", **more}


def bare() -> dict[str, str]:
    """The environment of `gpu.sh`; with ``python -S``, nothing of ours is installed."""
    packages = [folder for folder in sys.path if folder.endswith("-packages")]
    return environment(PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *packages]))
