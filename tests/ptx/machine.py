"""Launches of PTX kernels on CPU tensors (`assembler.py`, machine.cpp)."""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from support.builds import once
from torch import Tensor

from tests.ptx.assembler import Program, assemble

HERE = Path(__file__).parent
MOST = 50_000_000  # instructions of a thread, behind which no end is expected


class Fault(Exception):
    """A launch that did what it must not."""


class _Instruction(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("op", "guard", "negated", "d", "a", "b", "c")),
        ("value", ctypes.c_int64),
    )


@dataclass
class Memory:
    """What a launch may touch."""

    ranges: dict[tuple[int, int], bool] = field(default_factory=dict)  # begin, end: writable

    def allow(self, begin: int, size: int, writable: bool = False) -> None:
        if size:
            place = (begin, begin + size)
            self.ranges[place] = writable or self.ranges.get(place, False)

    def allow_tensor(self, tensor: Tensor) -> None:
        """To be read."""
        self.allow(tensor.data_ptr(), tensor.numel() * tensor.element_size())

    def sorted(self) -> list[tuple[int, int, bool]]:
        found = [(*place, writable) for place, writable in sorted(self.ranges.items())]
        for (_, end, _), (begin, *_) in itertools.pairwise(found):
            assert end <= begin, "tensors of a launch overlap"
        return found


@dataclass(frozen=True)
class Kernel:
    """A program as the machine takes it."""

    program: Program
    code: ctypes.Array[_Instruction]
    lists: ctypes.Array[ctypes.c_int32]
    slots: ctypes.Array[ctypes.c_uint64]

    @property
    def parameter_sizes(self) -> list[int]:
        return [parameter.size for parameter in self.program.parameters]


class Machine:
    """Runs kernels. `taken` counts the instructions of all threads so far."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.ptx_operation.restype = ctypes.c_char_p
        names = iter(functools.partial(self._name, itertools.count()), None)
        self.operations = {name: number for number, name in enumerate(names)}
        self.taken = 0

    def _name(self, numbers: Iterator[int]) -> str | None:
        name = self._library.ptx_operation(next(numbers))
        return None if name is None else name.decode()

    def load(self, text: str) -> Kernel:
        """The kernel whose PTX this is.

        Raises:
            Refused: it has an instruction that the machine lacks.
        """
        program = assemble(text, self.operations)
        code = [
            _Instruction(self.operations[i.op], i.guard, i.negated, i.d, i.a, i.b, i.c, i.value)
            for i in program.code
        ]
        return Kernel(
            program,
            (_Instruction * len(code))(*code),
            (ctypes.c_int32 * len(program.lists))(*program.lists),
            (ctypes.c_uint64 * len(program.slots))(*program.slots),
        )

    def launch(
        self, kernel: Kernel, arguments: Sequence[bytes], blocks: int, threads: int, memory: Memory
    ) -> None:
        """Runs a kernel.

        Args:
            arguments: the bytes of each parameter.
            threads: of a block, a multiple of 32.
            memory: all that it may touch.

        Raises:
            Fault: an access out of bounds, misaligned or forbidden, or no end.
        """
        program = kernel.program
        assert [len(x) for x in arguments] == kernel.parameter_sizes, program.name
        assert threads % 32 == 0
        passed = bytearray(sum(map(len, arguments)) + 8 * len(arguments))
        for parameter, value in zip(program.parameters, arguments, strict=True):
            passed[parameter.offset : parameter.offset + parameter.size] = value
        ranges = memory.sorted()
        flat = [int(number) for place in ranges for number in place]
        taken, why = ctypes.c_int64(0), ctypes.create_string_buffer(200)
        failed = self._library.ptx_launch(
            kernel.code,
            kernel.lists,
            kernel.slots,
            len(kernel.slots),
            (ctypes.c_uint8 * len(passed)).from_buffer(passed),
            (ctypes.c_uint64 * len(flat))(*flat),
            len(ranges),
            blocks,
            threads,
            ctypes.c_int64(MOST),
            ctypes.byref(taken),
            why,
            ctypes.c_size_t(len(why)),
        )
        self.taken += taken.value
        if failed >= 0:
            text = program.code[failed].text
            raise Fault(f"{why.value.decode()}: {text!r} of {program.name}")


def compiler() -> str:
    return os.environ.get("CXX", "c++")


def build(library: Path) -> None:
    command = [compiler(), "-std=c++20", "-O2", "-ffp-contract=off", "-fPIC", "-shared"]
    command += ["-Wall", "-Wextra", "-Werror", str(HERE / "machine.cpp"), "-o", str(library)]
    subprocess.run(command, check=True)


@functools.cache
def machine(folder: Path) -> Machine:
    """The machine, compiled into a folder."""
    return Machine(once(folder / "ptx_machine.so", build))
