"""The backends whose sweeps are compared with the reference, and how each is reached.

``emulated`` are the CUDA backend's own kernels, launchers and operators, compiled for the CPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.builds import once, shared_folder

from zo_fused.sweeps import dispatch
from zo_fused.sweeps.backends.multi_tensor import MultiTensor

ROOT = Path(__file__).parents[2]
GPU = torch.cuda.is_available()
NAMES = ("cpu", "triton", "emulated", pytest.param("cuda", marks=pytest.mark.gpu))


def _triton(mark: pytest.MarkDecorator) -> pytest.MarkDecorator:
    """Triton's interpreter runs a test if `mark` says so."""
    interpreted = pytest.param("triton", marks=() if GPU else mark)
    return pytest.mark.parametrize(
        "served", [interpreted if name == "triton" else name for name in NAMES], indirect=True
    )


long_in_triton = _triton(pytest.mark.slow)  # with `make test-all`, the first row of each test
too_long_in_triton = _triton(pytest.mark.gpu)  # minutes a row: on a GPU only


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class Served:
    """The sweeps of a backend."""

    name: str
    sweeps: Any  # has dense_ and the others
    device: torch.device
    examples: int  # that hypothesis may draw
    chunk: int  # elements of a parameter that are one piece of work in a sweep over noise,
    block: int  # and after which the loop over them begins anew
    settings: tuple[Callable[[], Any], ...] = (contextlib.nullcontext,)  # under which they run
    operators: Any = None  # of the extension,
    kernels: Any = None  # over these,
    launches: Callable[[], int] | None = None  # so far, where they are counted
    blocks_of: Any = None  # blocks of a launch, by its programs and the device's places


def serve(name: str, folders: pytest.TempPathFactory) -> Served:
    """A backend, or the test is skipped."""
    device = torch.device("cuda" if name in ("triton", "cuda") and GPU else "cpu")
    if name == "emulated":
        return emulated(folders)
    reason = dispatch.why_not(name, device.type)
    if reason is not None:
        pytest.skip(reason)
    sweeps = dispatch.load(name)
    if name == "cpu":
        settings = tuple(functools.partial(threads, count) for count in (1, 2))
        return Served(name, sweeps, device, 120, 1 << 16, 1 << 12, settings)
    if name == "triton":
        from zo_fused_kernels import launch

        return Served(name, sweeps, device, 4, launch.SMALL_CHUNK, launch.NOISE_BLOCK)
    return of_cuda(name, sweeps, device, torch.ops.zo_fused_CUDA, sweeps._kernels())


def of_cuda(name: str, sweeps: Any, device: torch.device, operators: Any, kernels: Any) -> Served:
    more = {"operators": operators, "kernels": kernels}
    return Served(name, sweeps, device, 40, kernels.CHUNK, kernels.CHUNK, **more)


# ---- CUDA without a GPU -------------------------------------------------------------------------


def emulated(folders: pytest.TempPathFactory) -> Served:
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("no C++ compiler")
    return emulation(shared_folder(folders))


@functools.cache
def emulation(folder: Path) -> Served:
    """The kernels compiled for the CPU; their operators are in torch.ops.zo_fused_emulation."""
    from zo_fused.sweeps.backends import cuda

    library = once(folder / "emulation.so", compile_emulation)
    torch.ops.load_library(str(library))
    count = ctypes.CDLL(str(library)).zo_fused_emulated_launches
    count.restype = ctypes.c_int64
    operators = torch.ops.zo_fused_emulation
    kernels = cuda.CudaKernels(operators)
    sweeps = SimpleNamespace(**MultiTensor(lambda: kernels).functions)
    served = of_cuda("emulated", sweeps, torch.device("cpu"), operators, kernels)
    served.launches = count
    served.blocks_of = ctypes.CDLL(str(library)).zo_fused_blocks_of
    served.blocks_of.argtypes, served.blocks_of.restype = [ctypes.c_int64] * 2, ctypes.c_int64
    return served


def compile_emulation(library: Path) -> None:
    from torch.utils.cpp_extension import include_paths, library_paths

    command = [os.environ.get("CXX", "c++"), "-std=c++20", "-O1", "-fPIC", "-shared"]
    command += ["-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter"]
    # As on a GPU, a 128-bit access of memory that isn't aligned ends the process.
    command += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
    command += ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
    command += ["-DZO_FUSED_CUDA_LIBRARY=zo_fused_emulation"]
    command += [f"-isystem{path}" for path in (*include_paths(), sysconfig.get_path("include"))]
    command += [
        str(ROOT / "csrc/cuda/binding.cpp"),
        str(ROOT / "tests/cuda_emulation/emulation.cpp"),
    ]
    command += [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-lc10"]
    subprocess.run([*command, "-o", str(library)], check=True)
