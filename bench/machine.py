"""What results say about the machine and the versions that they come from."""

from __future__ import annotations

import datetime
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import zo_fused
from zo_fused.sweeps.backends import cpu


def output_of(*command: str) -> str:
    """What a command prints, "" if it fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=20, cwd=Path(__file__).parent
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> str:
    return output_of("git", "describe", "--always", "--dirty") or "unknown"


def of_cpu() -> list[str]:
    """Lines for the head of a page."""
    name = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    backend = zo_fused.backend_of("cpu")
    detail = f" ({cpu.isa()})" if backend == "cpu" else ""
    return [
        f"CPU: {name}, {torch.get_num_threads()} threads; backend: {backend}{detail}",
        f"torch {torch.__version__}, zo_fused {zo_fused.__version__}, commit {commit()}",
    ]


def gpu_state() -> str:
    fields = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem"
    fields += ",power.draw,power.limit,temperature.gpu"
    return output_of("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")


def facts(device: str) -> dict[str, Any]:
    """By name, for a record of a run on "cpu" or "cuda"."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    described: dict[str, Any] = {
        "device": platform.processor() or platform.machine(),
        "driver": "none",
        "cuda": torch.version.cuda or "none",
        "torch": str(torch.__version__),
        "triton": triton,
        "python": platform.python_version(),
        "zo_fused": zo_fused.__version__,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        state = gpu_state()
        described |= {
            "device": properties.name,
            "driver": state.split(", ")[1] if state.count(", ") > 1 else "unknown",
            "memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "state at start": state,
        }
    return described
