"""Instructions that the CPU's sweeps execute for a weight: ``python -m bench.cpu.instructions``.

A process makes each sweep over one tensor and over one twice as long, step by step under ptrace
(Linux on x86). What the longer one executes more, in the extension, is what its weights take: all
of the loop, with spills, and nothing of the call. Nothing is timed, so a busy machine changes
nothing.

Where there is llvm-mca, it says how many cycles a block of the loop takes at least on a processor
whose loads and stores all hit the first cache: the bound of the arithmetic.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import zo_fused
from bench import machine
from bench.page import publish, table
from zo_fused.sweeps import operators
from zo_fused.sweeps.conversions import int64_tensor

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
LENGTH = 1024  # whole blocks of every instruction set, and less than a chunk
MODELS = {"avx2": ("skylake", "znver3"), "avx512": ("skylake-avx512", "icelake-server")}
TRACEME, PEEK, PEEK_USER, POKE, POKE_USER, CONT, STEP = 0, 1, 3, 4, 6, 7, 9  # requests of ptrace
RIP = 8 * 16  # in `struct user`
BREAKPOINT = 0xCC  # int3

# ---- the traced process --------------------------------------------------------------------------


def sweeps(length: int, only: str = "") -> Iterator[tuple[str, Callable[[], None]]]:
    """By name; each over one tensor. `only`: those whose name has this in it."""
    yield from ((name, sweep) for name, sweep in every_sweep(length) if only in name)


def every_sweep(length: int) -> Iterator[tuple[str, Callable[[], None]]]:
    ids, offsets, one = int64_tensor([0]), int64_tensor([0]), torch.ones(1)
    keys = int64_tensor([5, 6])

    def dense(w: torch.Tensor, directions: int, rounds: bool, transform: str) -> None:
        rounding = int64_tensor([7]) if rounds else None
        coeffs = torch.full((1, directions), 1e-9)
        operators.dense_([w], ids, offsets, keys[:directions], coeffs, one, rounding, transform)

    def moments(w: torch.Tensor, first: torch.Tensor, second: torch.Tensor, rule: str) -> None:
        grads, restores = torch.full((1, 1), 0.5), torch.full((1, 1), 1e-9)
        row = torch.tensor([[0.9, 0.1, 0.999, 0.001, 1e-8, -1e-9]])
        seconds = [second] if rule == "adam" else []
        streams = (ids, offsets, keys[:1])
        operators.moments_([w], [first], seconds, *streams, grads, restores, row, one, rule)

    for name, dtype in DTYPES.items():
        w = torch.full((length,), 0.02, dtype=dtype)
        for transform in ("portable", "hadamard"):
            for k in (1, 2):
                label = f"dense, {transform}" + ", 2 directions" * (k == 2)
                yield f"{label} {name}", lambda w=w, k=k, t=transform: dense(w, k, False, t)
        if dtype is not torch.float32:
            yield (
                f"dense, portable, stochastic {name}",
                lambda w=w: dense(w, 1, True, "portable"),
            )
        first, second = torch.zeros(length), torch.zeros(length)
        for rule in ("momentum", "adam"):
            yield (
                f"moments, {rule} {name}",
                lambda w=w, f=first, s=second, r=rule: moments(w, f, s, r),
            )


def traced(only: str) -> None:
    """Stops at first, and before and after every sweep, short and long."""
    torch.set_num_threads(1)
    if ctypes.CDLL(None).ptrace(TRACEME, 0, None, None):
        raise SystemExit("the system forbids ptrace")
    os.kill(os.getpid(), signal.SIGSTOP)
    with torch.no_grad():
        lengths = (sweeps(LENGTH, only), sweeps(2 * LENGTH, only))
        for (_, short), (_, long) in zip(*lengths, strict=True):
            for sweep in (short, long):
                sweep()  # what happens once has happened
                os.kill(os.getpid(), signal.SIGSTOP)
                sweep()
                os.kill(os.getpid(), signal.SIGSTOP)


# ---- the tracer ----------------------------------------------------------------------------------


class Tracer:
    """Over a process that runs `traced`."""

    def __init__(self, isa: str, only: str) -> None:
        ptrace = ctypes.CDLL(None, use_errno=True).ptrace
        ptrace.restype = ctypes.c_long
        ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
        self._ptrace = ptrace
        command = [sys.executable, "-m", "bench.cpu.instructions", "--traced", "--only", only]
        environment = {**os.environ, "ZO_FUSED_ISA": isa, "OMP_NUM_THREADS": "1"}
        self.pid = os.posix_spawn(sys.executable, command, environment)
        self.wait()

    def wait(self, wanted: int = signal.SIGSTOP) -> None:
        """For the process to stop, with the signal that it should."""
        _, status = os.waitpid(self.pid, 0)
        if not os.WIFSTOPPED(status) or os.WSTOPSIG(status) != wanted:
            raise RuntimeError(f"the traced process has status {status:#x}")

    def run(self, until: int = signal.SIGSTOP) -> None:
        self._ptrace(CONT, self.pid, None, None)
        self.wait(until)

    def end(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def extension(self) -> range:
        """Where the extension lies."""
        lines = Path(f"/proc/{self.pid}/maps").read_text().splitlines()
        places = [line.split("-") for line in lines if "/_C.abi3" in line]
        return range(int(places[0][0], 16), int(places[-1][1].split()[0], 16))

    def sweep(self, functions: list[int]) -> list[int]:
        """The addresses of a sweep's instructions, in order, from the call of one of the functions.

        The process stands before the sweep, and then after it.
        """
        where = self.extension()
        places = [where.start + function for function in functions]
        words = {place: self._ptrace(PEEK, self.pid, place, None) for place in places}
        for place, word in words.items():
            self._ptrace(POKE, self.pid, place, word & ~0xFF | BREAKPOINT)
        self.run(signal.SIGTRAP)
        for place, word in words.items():
            self._ptrace(POKE, self.pid, place, word)
        at = self._ptrace(PEEK_USER, self.pid, RIP, None) - 1
        self._ptrace(POKE_USER, self.pid, RIP, at)
        found = []
        while at in where:  # until it calls or returns to something else
            found.append(at - where.start)
            self._ptrace(STEP, self.pid, None, None)
            self.wait(signal.SIGTRAP)
            at = self._ptrace(PEEK_USER, self.pid, RIP, None)
        self.run()
        return found


def functions_of_sweeps() -> list[int]:
    """Addresses in the extension of the functions in the tables of `csrc/cpu/sweeps.h`."""
    command = ["nm", "--demangle", str(extension())]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    pattern = r"^(\w+) t void zo_fused::\(anonymous namespace\)::\w+<zo_fused::Twice.*\)$"
    return [int(address, 16) for address in re.findall(pattern, printed, re.MULTILINE)]


def extension() -> Path:
    (path,) = Path(zo_fused.__file__).parent.glob("_C.*so")
    return path


def loop_of(short: list[int], long: list[int]) -> tuple[Counter[int], list[int]]:
    """How often each address is executed for what the long sweep has more; a round of the loop."""
    more = Counter(long)
    more.subtract(Counter(short))
    more = +more
    rounds = min(more.values())  # all of these go the same way
    first = next(address for address in long if more[address] == rounds)
    begins = [i for i, address in enumerate(long) if address == first]
    return more, long[begins[-2] : begins[-1]]


def disassembled() -> dict[int, str]:
    """The extension's instructions by their address."""
    command = ["objdump", "-d", "--no-show-raw-insn", str(extension())]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines = re.findall(r"^\s*([0-9a-f]+):\t(.*?)\s*$", printed, re.MULTILINE)
    return {int(address, 16): re.sub(r"\s*[#<].*", "", text) for address, text in lines}


def cycles(code: list[str], model: str) -> float | None:
    """Of one round at the least, by llvm-mca; None without it."""
    if shutil.which("llvm-mca") is None:
        return None
    # Branches go somewhere else than a number, and what they go to does not matter.
    text = "\n".join(re.sub(r"^(j\w+)\s+\w+$", r"\1 .L", line) for line in code)
    command = ["llvm-mca", f"-mcpu={model}", "-iterations=100"]
    done = subprocess.run(command, input=f".L:\n{text}\n", capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-1000:])
    (total,) = re.findall(r"^Total Cycles:\s+(\d+)", done.stdout, re.MULTILINE)
    return int(total) / 100


def rows(isa: str, only: str = "") -> Iterator[dict[str, Any]]:
    """A row for each sweep whose name has `only` in it, by one instruction set."""
    code, functions = disassembled(), functions_of_sweeps()
    tracer = Tracer(isa, only)
    try:
        for name, _ in sweeps(LENGTH, only):
            found = []
            for _ in range(2):
                tracer.run()
                found.append(tracer.sweep(functions))
            yield {"instruction set": isa, "sweep": name, **facts(isa, code, *found)}
    finally:
        tracer.end()


def facts(isa: str, code: dict[int, str], short: list[int], long: list[int]) -> dict[str, Any]:
    """Of a weight, from the addresses of both lengths."""
    more, round_ = loop_of(short, long)
    stack = sum(n for address, n in more.items() if "(%rsp" in code[address])
    weights = LENGTH / min(more.values())  # of a round
    found: dict[str, Any] = {
        "instructions": sum(more.values()) / LENGTH,
        "on the stack": stack / LENGTH,
    }
    for model in MODELS[isa]:
        taken = cycles([code[address] for address in round_], model)
        found[model] = taken and taken / weights
    return found


def page(sets: list[str], only: str) -> Iterator[str]:
    yield "`python -m bench.cpu.instructions`\n"
    yield from machine.of_cpu()
    yield "\nA weight's instructions; those with a place on the stack (spills); cycles by model.\n"
    found = [row for isa in sets for row in rows(isa, only)]
    names = dict.fromkeys(name for row in found for name in row)
    yield from table(found, {name: name for name in names})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sets", nargs="+", choices=[*MODELS], default=[*MODELS])
    parser.add_argument("--only", default="", help="sweeps whose name has this in it")
    parser.add_argument("--out", type=Path, help="also write the page to this file")
    parser.add_argument("--traced", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.traced:
        traced(options.only)
    else:
        publish(page(options.sets, options.only), options.out)


if __name__ == "__main__":
    main()
