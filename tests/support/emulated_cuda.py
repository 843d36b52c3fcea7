"""The CUDA kernels, launchers and operators, compiled by g++ for the CPU."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from zo_fused.sweeps.backends import cuda
from zo_fused.sweeps.backends.multi_tensor import MultiTensor

ROOT = Path(__file__).parents[2]


@dataclass
class Served:
    """Sweeps over kernels, and the device of their tensors."""

    sweeps: Any  # has dense_ and the others
    operators: Any  # of the extension
    kernels: Any  # over these
    device: torch.device
    launches: Callable[[], int] | None = None  # so far, where they are counted


def emulation(folders: pytest.TempPathFactory) -> Served:
    """The kernels compiled for the CPU; their operators are in torch.ops.zo_fused_emulation."""
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("no C++ compiler")
    folder = folders.getbasetemp() / "emulation"
    folder.mkdir(exist_ok=True)
    return _compiled(folder)


@functools.cache
def _compiled(folder: Path) -> Served:
    from torch.utils.cpp_extension import include_paths, library_paths

    library = folder / "emulation.so"
    python = sysconfig.get_path("include")
    command = [os.environ.get("CXX", "c++"), "-std=c++20", "-O1", "-fPIC", "-shared"]
    command += ["-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter"]
    # As on a GPU, a 128-bit access of memory that isn't aligned ends the process.
    command += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
    command += ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
    command += ["-DZO_FUSED_CUDA_LIBRARY=zo_fused_emulation"]
    command += [f"-isystem{path}" for path in (*include_paths(), python)]
    command += [
        str(ROOT / "csrc/cuda/binding.cpp"),
        str(ROOT / "tests/cuda_emulation/emulation.cpp"),
    ]
    command += [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-lc10"]
    subprocess.run([*command, "-o", str(library)], check=True)
    torch.ops.load_library(str(library))
    count = ctypes.CDLL(str(library)).zo_fused_emulated_launches
    count.restype = ctypes.c_int64
    operators = torch.ops.zo_fused_emulation
    kernels = cuda.CudaKernels(operators)
    sweeps = SimpleNamespace(**MultiTensor(lambda: kernels).functions)
    return Served(sweeps, operators, kernels, torch.device("cpu"), count)
