"""The sweeps of Triton and CUDA over their compilers' PTX, run by the machine.

Everything but the launch is the product's: arguments, tables, which kernel serves which call. A
launch may touch the tensors that it was given and no byte more, and writes only what its sweep
writes.
"""

from __future__ import annotations

import ctypes
import functools
import runpy
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from support.builds import once
from support.served import ROOT, Served, emulation
from torch import Tensor

from bench.gpu import sass
from tests.ptx.assembler import entries
from tests.ptx.machine import Kernel, Machine, Memory
from zo_fused.sweeps.arguments import mask_bytes
from zo_fused.sweeps.backends import table
from zo_fused.sweeps.backends.multi_tensor import MultiTensor
from zo_fused.sweeps.backends.table import Launch
from zo_fused.sweeps.signatures import SWEEPS

Change = Callable[[str], str]  # of a kernel's PTX: a planted fault


def memory_of(sweep: str, launch: Launch, given: tuple[Any, ...]) -> Memory:
    """What a launch may touch."""
    memory = Memory()
    for tensor in (launch.table, *given):
        if isinstance(tensor, Tensor):
            memory.allow_tensor(tensor)
    for row in launch.table.tolist():
        size = launch.dtype.itemsize
        if sweep == "lowrank":
            m, n, rank = row[table.ROWS], row[table.COLUMNS], row[table.RANK]
            memory.allow(row[table.ADDRESS], m * n * size, writable=True)
            memory.allow(row[table.U], m * rank * 4)
            memory.allow(row[table.V], n * rank * 4)
        else:
            memory.allow(row[table.ADDRESS], row[table.NUMEL] * size, writable=True)
            for i, dtype in enumerate(launch.state_dtypes):
                size = row[table.NUMEL] * dtype.itemsize
                if dtype == torch.uint8:
                    size = mask_bytes(row[table.NUMEL], row[table.OFFSET])
                memory.allow(row[table.STATES + i], size, writable=sweep == "moments")
    return memory


class Runner:
    """Runs launches of a compiler's kernels."""

    def __init__(self, machine: Machine, kernels: Any) -> None:
        """kernels: a `zo_fused.sweeps.backends.multi_tensor.Kernels` that launches by `run`."""
        self.machine = machine
        self.kernels = kernels
        self.change: Change = lambda text: text
        self.launches: Counter[str] = Counter()  # so far, by kernel
        self.entries: dict[str, str] = {}  # PTX of all kernels, where it is known from the start
        self._memory = Memory()
        self._loaded: dict[Any, Kernel] = {}
        self._error: Exception | None = None

    def plant(self, change: Change) -> None:
        if change is not self.change:
            self.change = change
            self._loaded.clear()

    def run(self, name: str, text: str, blocks: int, threads: int, arguments: list[bytes]) -> None:
        """A launch of the kernel with this name and PTX. A program may have more parameters, whose
        arguments are then zero (Triton's scratch memory)."""
        if name not in self._loaded:
            self._loaded[name] = self.machine.load(self.change(text))
        kernel = self._loaded[name]
        arguments = arguments + [bytes(n) for n in kernel.parameter_sizes[len(arguments) :]]
        self.machine.launch(kernel, arguments, blocks, threads, self._memory)
        self.launches[name] += 1

    def served(self, name: str, block: int) -> Served:
        """block: elements of the longest piece of code without a loop."""
        sweeps = MultiTensor(lambda: self._watched).functions
        chunk = self.kernels.chunk(0, 1)
        return Served(name, SimpleNamespace(**sweeps), torch.device("cpu"), 4, chunk, block)

    @functools.cached_property
    def _watched(self) -> Any:
        """The kernels, launched with their memory known."""

        def watched(sweep: str) -> Callable[..., None]:
            def launch(launch: Launch, *given: Any) -> None:
                self._memory, self._error = memory_of(sweep, launch, given), None
                getattr(self.kernels, sweep)(launch, *given)
                if self._error is not None:
                    raise self._error

            return launch

        def key(out: Tensor, counter: Tensor, *numbers: int) -> None:
            self._memory, self._error = Memory(), None
            self._memory.allow(out.data_ptr(), out.nbytes, writable=True)
            self._memory.allow_tensor(counter)
            self.kernels.key(out, counter, *numbers)
            if self._error is not None:
                raise self._error

        sweeps = [name.removesuffix("_") for name in SWEEPS]
        made = {name: watched(name) for name in sweeps if hasattr(self.kernels, name)}
        return SimpleNamespace(chunk=self.kernels.chunk, TILE=self.kernels.TILE, key=key, **made)


# ---- Triton -------------------------------------------------------------------------------------


class TritonRunner(Runner):
    """In a process that does not interpret."""

    def __init__(self, machine: Machine, target: str) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.runtime import driver
        from triton.runtime.jit import JITFunction
        from zo_fused_kernels import sweeps

        super().__init__(machine, sweeps)
        driver.set_active(sass.OfflineDriver(GPUTarget(*sass.TARGETS[target])))
        compile_ = JITFunction.run

        def run(function: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
            kernel = compile_(function, *args, grid=grid, warmup=True, **options)
            names = [parameter.name for parameter in function.params]
            self._launch(kernel, dict(zip(names, args, strict=False)), grid[0])

        JITFunction.run = run

    def _launch(self, kernel: Any, given: dict[str, Any], blocks: int) -> None:
        arguments = []
        for name, type_ in kernel.src.signature.items():
            if type_.startswith("*"):
                self._memory.allow_tensor(given[name])
                arguments.append(given[name].data_ptr().to_bytes(8, "little"))
            elif type_ != "constexpr":
                size = int(type_[1:]) // 8
                arguments.append(int(given[name]).to_bytes(size, "little", signed=True))
        name = f"{kernel.metadata.name} {kernel.hash[:8]}"
        ((_, text),) = entries(kernel.asm["ptx"]).items()
        self.run(name, text, blocks, kernel.metadata.num_warps * 32, arguments)


# ---- CUDA ---------------------------------------------------------------------------------------


class CudaRunner(Runner):
    """Launchers and operators are those of the emulation."""

    def __init__(self, machine: Machine, folder: Path, target: str) -> None:
        super().__init__(machine, emulation(folder).kernels)
        path = once(folder / f"cuda_{target}.ptx", functools.partial(compile_cuda, target))
        self.entries = entries(path.read_text())
        signature = (ctypes.c_char_p, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_int32)
        pointers = (ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_size_t))
        self._callback = ctypes.CFUNCTYPE(None, *signature, *pointers)(self._launch)
        ctypes.CDLL(str(folder / "emulation.so")).zo_fused_emulate_with(self._callback)

    def _launch(
        self, name: bytes, blocks: int, threads: int, count: int, arguments: Any, sizes: Any
    ) -> None:
        passed = [ctypes.string_at(arguments[i], sizes[i]) for i in range(count)]
        try:
            self.run(name.decode(), self.entries[name.decode()], blocks, threads, passed)
        except Exception as error:  # none can pass through C++
            self._error = error


def compile_cuda(target: str, path: Path) -> None:
    """The kernels' PTX, with the options of the build."""
    build = runpy.run_path(str(ROOT / "setup.py"), run_name="build")
    command = [build["find_nvcc"](), *build["NVCC_ARGS"]]
    command += [f"-arch={target.replace('sm', 'compute')}", "-ptx", "-o", str(path)]
    subprocess.run([*command, str(ROOT / "csrc/cuda/launch.cu")], check=True)
