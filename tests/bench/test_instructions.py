"""How the CPU's instructions are counted, and that a sweep takes no more of them than it did."""

from __future__ import annotations

import platform
import shutil
import sys

import pytest

from bench.cpu import instructions
from zo_fused.sweeps.backends import cpu

traceable = pytest.mark.skipif(
    sys.platform != "linux"
    or platform.machine() != "x86_64"
    or cpu.why_not("cpu") is not None
    or not (shutil.which("nm") and shutil.which("objdump")),
    reason="needs Linux on x86, the extension and binutils",
)


def test_what_a_longer_sweep_executes_more_is_counted() -> None:
    before, after = [10, 11], [90]
    once, inner = [20, 21, 22, 23], [30, 31]
    loop = once + 3 * inner + [40]
    more, round_ = instructions.loop_of(before + 2 * loop + after, before + 6 * loop + after)
    assert more == {20: 4, 21: 4, 22: 4, 23: 4, 30: 12, 31: 12, 40: 4}
    assert round_ == loop
    code = dict.fromkeys([*before, *loop, *after], "add %eax,%ebx")
    code[31] = "mov %eax,0x10(%rsp)"
    code[11] = "mov %eax,(%rsp)"
    found = instructions.facts("avx2", code, before + 2 * loop + after, before + 6 * loop + after)
    assert found["instructions"] == 4 * len(loop) / instructions.LENGTH
    assert found["on the stack"] == 12 / instructions.LENGTH


@pytest.mark.skipif(shutil.which("llvm-mca") is None, reason="no llvm-mca")
def test_cycles_are_those_of_the_chain() -> None:
    multiply = "vmulps %ymm0,%ymm0,%ymm0"  # latency 4, one after the other
    assert instructions.cycles([multiply] * 5 + ["jne 1234"], "skylake") == pytest.approx(20, abs=1)


# By g++ 12 they take 14.9, 4.8 and 4.9, 1.8.
@traceable
@pytest.mark.slow
@pytest.mark.parametrize(
    ("isa", "sweep", "limit"),
    [
        ("avx2", "dense, portable fp16", 17),
        ("avx2", "dense, hadamard fp16", 6),
        ("avx512", "dense, portable fp16", 6),
        ("avx512", "dense, hadamard fp16", 2.5),
    ],
)
def test_instructions_of_a_weight(isa: str, sweep: str, limit: float) -> None:
    known = ("portable", "avx2", "avx512")
    if known.index(cpu.isa()) < known.index(isa):
        pytest.skip(f"{isa} is not to be had here")
    (row,) = instructions.rows(isa, sweep)
    assert row["sweep"] == sweep
    assert limit / 2 < row["instructions"] < limit
    assert 0 <= row["on the stack"] < row["instructions"] / 2
