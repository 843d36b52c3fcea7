"""What only the C++ backend has: instruction sets, what its operators refuse, its memory, headers.

`test_parity.py` compares its sweeps with the reference, in one thread and in two.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.calls import DTYPES, ROUNDING, int64
from support.equality import assert_same_bits, bits

from zo_fused.noise import reference as noise_reference
from zo_fused.noise.streams import philox4x32
from zo_fused.sweeps import reference
from zo_fused.sweeps.backends import cpu
from zo_fused.sweeps.numbers import EXACT, TRANSFORMS

TESTS = Path(__file__).parents[1]
ISAS = ("portable", "avx2", "avx512")

needs_extension = pytest.mark.skipif(cpu.why_not("cpu") is not None, reason=str(cpu.why_not("cpu")))


# ---- noise --------------------------------------------------------------------------------------


@needs_extension
@given(
    n=st.integers(0, 2**61 - 1),
    id_=st.integers(0, 2**64 - 1),
    key=st.integers(0, 2**64 - 1),
    words=st.integers(0, 3),
)
@settings(max_examples=40)
def test_bits_are_philox(n: int, id_: int, key: int, words: int) -> None:
    """Against Philox on Python integers; `words` of the counter are skipped."""
    out = torch.zeros(4 - words, dtype=torch.int64)
    cpu.bits_([out], int64(id_), int64(4 * n + words), int64(key))
    expected = philox4x32(
        (n & 0xFFFFFFFF, n >> 32, id_ & 0xFFFFFFFF, id_ >> 32), (key & 0xFFFFFFFF, key >> 32)
    )
    assert out.tolist() == list(expected)[words:]


@needs_extension
def test_known_answer() -> None:
    out = torch.zeros(4, dtype=torch.int64)
    cpu.bits_([out], int64(0), int64(0), int64(0))
    assert out.tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounding", [False, True])
def test_flush_denormal_changes_nothing(dtype: torch.dtype, rounding: bool) -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this machine cannot flush subnormal numbers")
    torch.set_flush_denormal(False)
    scale = 2.0**-14 if dtype == torch.float16 else 2.0**-126
    tiny = torch.full((100,), scale / 16, dtype=dtype)
    expected = tiny.clone()
    rest = (int64(0), int64(0), int64(5), torch.full((1, 1), scale / 512), torch.tensor([0.5]))
    rest += (ROUNDING if rounding else None,)
    reference.dense_([expected], *rest)
    torch.set_flush_denormal(True)
    try:
        cpu.dense_([tiny], *rest)
    finally:
        torch.set_flush_denormal(False)
    assert_same_bits(tiny, expected)


@needs_extension
@pytest.mark.parametrize("transform", [-1, len(EXACT), len(TRANSFORMS)])
def test_operators_refuse_transforms_that_they_lack(transform: int) -> None:
    out, one = torch.zeros(5), torch.ones(1)
    table = cpu.noise_table("dense_", [[out]], int64(0), int64(0))
    operators, rows = torch.ops.zo_fused_C, (table, int64(1))
    for call in (
        lambda: operators.normal(*rows, transform),
        lambda: operators.dense(*rows, one, one, None, transform),
        lambda: operators.dense_steps(*rows, int64(0, -1, -1)[None], one, one, transform),
        lambda: operators.moments(*rows, one, one, torch.ones(6), one, 0, None, transform, None),
    ):
        with pytest.raises(RuntimeError, match="no transform"):
            call()
    assert not out.any()


# ---- the build ----------------------------------------------------------------------------------


@needs_extension
def test_unsupported_dtype_raises_and_writes_nothing() -> None:
    good, bad = torch.zeros(5), torch.zeros(5, dtype=torch.float64)
    with pytest.raises(TypeError, match="float16, bfloat16 or float32"):
        cpu.dense_([good, bad], int64(0, 1), int64(0, 0), int64(1), torch.ones(2, 1), torch.ones(2))
    with pytest.raises(TypeError, match="dtype"):
        cpu.normal_([good, bad], int64(0, 1), int64(0, 0), int64(1, 1))
    rest = (int64(0), int64(0), int64(1), torch.ones(1, 1), torch.ones(1, 1), torch.ones(1, 6))
    with pytest.raises(TypeError, match="float16, bfloat16 or float32"):
        cpu.moments_([good], [bad], [], *rest, torch.ones(1), "sign")
    with pytest.raises(TypeError, match="dtype"):
        cpu.moments_([good], [good], [bad], *rest, torch.ones(1), "adam")
    assert not good.any()


@needs_extension
def test_rounding_without_streams_raises() -> None:
    w, one = torch.zeros(5, dtype=torch.float16), torch.ones(1)
    factors = ([torch.ones(5, 1)], [torch.ones(1, 1)])
    with pytest.raises(ValueError, match="needs ids and offsets"):
        cpu.lowrank_([w], *factors, one, one, None, None, int64(1))
    assert not w.any()


@needs_extension
@pytest.mark.skipif("ZO_FUSED_ISA" in os.environ, reason="the process above runs it")
@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa: str, tmp_path: Path) -> None:
    """These tests and those of parity, in a process that is told to use the instruction set."""
    if isa == cpu.isa():
        pytest.skip("the one that this process uses")
    if ISAS.index(isa) > ISAS.index(cpu.isa()):
        pytest.skip(f"this CPU lacks {isa}")
    chosen = "(native or cpu) and not (memory or headers or unknown or every_instruction)"
    files = (__file__, str(Path(__file__).with_name("test_parity.py")))
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, *files],
        env={**os.environ, "ZO_FUSED_ISA": isa},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]


@needs_extension
def test_instruction_set_is_the_one_asked_for() -> None:
    wanted = os.environ.get("ZO_FUSED_ISA")
    assert cpu.isa() == wanted if wanted else cpu.isa() in ISAS


@needs_extension
def test_unknown_instruction_set_is_an_error() -> None:
    code = "from zo_fused.sweeps.backends import cpu; cpu.isa()"
    env = {**os.environ, "ZO_FUSED_ISA": "mmx"}
    run = subprocess.run(
        [sys.executable, "-P", "-c", code], env=env, capture_output=True, text=True
    )
    assert run.returncode != 0
    assert "ZO_FUSED_ISA=mmx: choose portable, avx2 or avx512" in run.stderr


PEAK_MEMORY = """
    import resource
    import torch
    from zo_fused.sweeps.backends import cpu

    def peak():  # bytes
        try:
            with open("/proc/self/status") as status:
                line = next(line for line in status if line.startswith("VmHWM"))
            return int(line.split()[1]) * 1024
        except OSError:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def growth(sweep):
        sweep()  # threads and their stacks exist after this
        try:
            with open("/proc/self/clear_refs", "w") as refs:
                refs.write("5")
        except OSError:
            pass
        before = peak()
        sweep()
        return peak() - before

    rows, columns, rank = 8192, 8192, 4
    w = torch.zeros(rows, columns, dtype=torch.float16)
    zero, one = torch.zeros(1, dtype=torch.int64), torch.ones(1)
    streams = (zero, zero, zero)
    u, v = torch.randn(rows, rank), torch.randn(columns, rank)
    print(growth(lambda: cpu.dense_([w], *streams, one[None], one)))
    print(growth(lambda: cpu.dense_([w], *streams, one[None], one, zero)))
    factor = 4 * columns * rank
    print(growth(lambda: cpu.lowrank_([w], [u], [v], one, one)) - factor)
    print(growth(lambda: cpu.lowrank_([w], [u], [v], one, one, *streams)) - factor)
    grads = (one[None], one[None])
    moments = ([torch.zeros_like(w)], [], *streams, *grads, torch.ones(1, 6), one, "sign", zero)
    print(growth(lambda: cpu.moments_([w], *moments)))
    moments = ([], [], *streams, *grads, torch.ones(1, 6), one, "adam", None, "portable", one[None])
    print(growth(lambda: cpu.moments_([w], *moments)))
"""


@needs_extension
def test_peak_memory() -> None:
    """A sweep over 64M elements needs less than 1 MB beside the weights and one factor."""
    run = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(PEAK_MEMORY)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    growths = [int(line) for line in run.stdout.split()]
    assert len(growths) == 6
    assert max(growths) < 2**20, growths


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_headers_alone(compiler: str, tmp_path: Path) -> None:
    """philox.h and normal.h compile without torch and give the known answers."""
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    program = tmp_path / "noise"
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(
        [compiler, *flags, str(TESTS / "cpp/noise.cpp"), "-o", str(program), "-lm"], check=True
    )
    lines = (TESTS / "data/philox_kat.txt").read_text().splitlines()
    known = [line.split(";") for line in lines if not line.startswith("#")]
    answers = subprocess.run(
        [str(program)],
        input="\n".join(counter + key for counter, key, _ in known),
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert len(answers) == len(known) == 3
    for answer, (_, _, expected) in zip(answers, known, strict=True):
        words, normals, signs = (answer.split()[i : i + 4] for i in (0, 4, 8))
        assert words == expected.split()
        w = [torch.tensor([int(word, 16)]) for word in words]
        z = (*noise_reference.normal_pair(w[0], w[1]), *noise_reference.normal_pair(w[2], w[3]))
        assert [f"{bits(x).item() & 0xFFFFFFFF:08x}" for x in z] == normals
        assert signs == ["bf800000" if int(word, 16) & 1 else "3f800000" for word in words]
