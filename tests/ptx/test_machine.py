"""The PTX machine but for its operations: what it reads, what it refuses, and what it sees."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from support.builds import shared_folder

from tests.ptx.assembler import Refused, entries
from tests.ptx.machine import Fault, Machine, Memory, machine

REGISTERS = ".reg .pred %p<4>; .reg .b16 %h<8>; .reg .b32 %r<8>; .reg .b64 %d<8>;"
OUT = "ld.param.u64 %d0, [out]; mov.u32 %r0, %tid.x; mad.wide.u32 %d1, %r0, 4, %d0;"


@pytest.fixture(scope="module")
def ptx(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return machine(shared_folder(tmp_path_factory))


def source(body: str, more: str = "") -> str:
    """A kernel with a pointer in %d0, and that plus 4 times the thread's number in %d1."""
    return f".entry k(.param .u64 .ptr .global .align 1 out{more})\n{{ {REGISTERS} {OUT} {body} }}"


def run(ptx: Machine, body: str, threads: int = 32) -> np.ndarray:
    """What a kernel without other memory writes to the 32-bit words of its threads."""
    out = np.zeros(threads, np.uint32)
    memory = Memory()
    memory.allow(out.ctypes.data, out.nbytes, writable=True)
    address = out.ctypes.data.to_bytes(8, "little")
    ptx.launch(ptx.load(source(body)), [address], 1, threads, memory)
    return out


# ---- instructions that are no operations on values ----------------------------------------------


def test_a_loop_runs_as_often_as_each_thread_has_it(ptx: Machine) -> None:
    body = """
    mov.b32 %r1, 0;
    mov.b32 %r2, 0x10U;
    $L__BB0_1:  // a comment
    .loc 1 2 3
    .pragma "nounroll";
    setp.ge.u32 %p1, %r1, %r0;
    @%p1 bra $L__BB0_2;
    add.s32 %r1, %r1, 1;
    add.s32 %r2, %r2, -3;
    bra.uni $L__BB0_1;
    $L__BB0_2:
    st.global.u32 [%d1], %r2;
    ret;
    """
    wanted = (16 - 3 * np.arange(64)) % 2**32
    assert (run(ptx, body, 64) == wanted).all()


@pytest.mark.parametrize("guard", ["@%p1", "@!%p1"])
def test_guards(ptx: Machine, guard: str) -> None:
    body = f"setp.lt.s32 %p1, %r0, 5; {guard} st.global.b32 [%d1], 7; ret;"
    inside = np.arange(32) < 5
    assert (run(ptx, body) == 7 * (inside if guard == "@%p1" else ~inside)).all()
    # Returns, too.
    body = f"setp.lt.s32 %p1, %r0, 5; {guard} ret; st.global.b32 [%d1], 7; ret;"
    assert (run(ptx, body) == 7 * (~inside if guard == "@%p1" else inside)).all()


def test_parts_of_values_and_scopes(ptx: Machine) -> None:
    body = """
    mov.b32 %r1, 0x40003C00;
    {.reg .f16 a, b; mov.b32 {a, b}, %r1; {.reg .f16 a; mov.b16 a, 9;} mov.b32 %r2, {b, a};}
    {.reg .b16 a; mov.b32 {_, a}, %r2; cvt.u32.u16 %r3, a;}
    mov.b64 %d2, {%r2, %r3};
    shr.u64 %d2, %d2, 16;
    mov.b64 {%r4, %r5}, %d2;
    st.global.b32 [%d1], %r4;
    setp.eq.s32 %p1, %r0, 1;
    @%p1 st.global.b32 [%d1], %r5;
    ret;
    """
    made = run(ptx, body)
    assert (made[0], made[1]) == (0x3C003C00, 0)


def test_vectors_and_narrow_values(ptx: Machine) -> None:
    body = """
    setp.ne.s32 %p1, %r0, 0;
    @%p1 ret;
    st.global.v4.u32 [%d1], {1, 2, %r0, -1};
    ld.global.v2.b32 {%r1, %r2}, [ %d1 + 8 ];
    ld.global.b16 { %h1 }, [%d1+12];
    cvt.u32.u16 %r3, %h1;
    add.s32 %r3, %r3, 1;
    add.s64 %d2, %d1, 32;
    st.global.v2.b32 [%d2+-16], {%r2, %r3};
    ret;
    """
    assert run(ptx, body)[:6].tolist() == [1, 2, 0, 2**32 - 1, 2**32 - 1, 2**16]


def test_parameters_are_where_the_abi_has_them(ptx: Machine) -> None:
    more = ", .param .u32 n, .param .align 8 .b8 table[24], .param .b16 last"
    body = """
    ld.param.u32 %r1, [n];
    ld.param.u64 %d2, [table+16];
    ld.param.v2.b32 {%r2, %r3}, [table+8];
    ld.param.b16 %h1, [last];
    cvt.u32.u64 %r4, %d2;
    cvt.u32.u16 %r5, %h1;
    setp.eq.s32 %p1, %r0, 0;
    @%p1 st.global.v4.b32 [%d1], {%r1, %r2, %r3, %r4};
    @%p1 st.global.b32 [%d1+16], %r5;
    ret;
    """
    out, memory = np.zeros(8, np.uint32), Memory()
    memory.allow(out.ctypes.data, out.nbytes, writable=True)
    given = [struct.pack("<Q", out.ctypes.data), struct.pack("<I", 1)]
    given += [struct.pack("<QIIQ", 9, 2, 3, 4), struct.pack("<H", 5)]
    kernel = ptx.load(source(body, more))
    assert [p.offset for p in kernel.program.parameters] == [0, 8, 16, 40]
    ptx.launch(kernel, given, 1, 32, memory)
    assert out.tolist() == [1, 2, 3, 4, 5, 0, 0, 0]


def test_special_registers(ptx: Machine) -> None:
    out, memory = np.zeros(3 * 64, np.uint32), Memory()
    memory.allow(out.ctypes.data, out.nbytes, writable=True)
    body = """
    mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ntid.x; mad.lo.s32 %r3, %r1, %r2, %r0;
    mad.wide.u32 %d1, %r3, 4, %d0;
    mov.u32 %r4, %nctaid.x; mul.lo.s32 %r4, %r4, 1000;
    add.s32 %r4, %r4, %r3;
    mov.u32 %r5, %ctaid.z; add.s32 %r4, %r4, %r5;
    mov.u32 %r5, %ntid.y; mul.lo.s32 %r4, %r4, %r5;
    st.global.b32 [%d1], %r4;
    ret;
    """
    ptx.launch(ptx.load(source(body)), [out.ctypes.data.to_bytes(8, "little")], 3, 64, memory)
    assert (out == 3000 + np.arange(3 * 64)).all()


def test_parameters_keep_their_sign(ptx: Machine) -> None:
    out, memory = np.zeros(2, np.int64), Memory()
    memory.allow(out.ctypes.data, out.nbytes, writable=True)
    body = "ld.param.s32 %d2, [n]; st.global.b64 [%d0], %d2; ret;"
    arguments = [out.ctypes.data.to_bytes(8, "little"), (-7).to_bytes(4, "little", signed=True)]
    ptx.launch(ptx.load(source(body, ", .param .u32 n")), arguments, 1, 32, memory)
    assert out.tolist() == [-7, 0]


def test_a_warp_exchanges(ptx: Machine) -> None:
    body = """
    mov.u32 %r1, 31; mov.u32 %r2, -1; add.s32 %r3, %r0, 33;
    shfl.sync.idx.b32 %r4|%p1, %r0, %r3, %r1, %r2;
    st.global.b32 [%d1], %r4;
    ret;
    """
    threads = np.arange(64)
    assert (run(ptx, body, 64) == threads // 32 * 32 + (threads + 1) % 32).all()
    immediate = body.replace("%r3, %r1, %r2;", "1, 31, -1;")
    assert (run(ptx, immediate, 64) == threads // 32 * 32 + 1).all()
    apart = body.replace("shfl", "setp.lt.s32 %p2, %r0, 5; @%p2 ret; shfl")
    part = body.replace("%r2, -1", "%r2, 1")
    for wrong in (apart, part):
        with pytest.raises(Fault, match="not by a whole warp: 'shfl"):
            run(ptx, wrong)


def test_registers_hold_nothing_useful_at_first(ptx: Machine) -> None:
    assert run(ptx, "st.global.b32 [%d1], %r5; ret;")[0] == 0xA5A5A5A5


# ---- what it sees -------------------------------------------------------------------------------

ACCESSES = {
    "st.global.b32 [%d1], 1;": None,
    "st.global.b32 [%d1+4], 1;": "out of bounds",  # of the last thread
    "st.global.b32 [%d1+-4], 1;": "out of bounds",  # of the first
    "ld.global.b32 %r1, [%d1+4];": "out of bounds",
    "ld.global.v2.b32 {%r1, %r2}, [%d0+124];": "misaligned",
    "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d0+116];": "misaligned",
    "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d0+112];": None,
    "ld.global.b64 %d2, [%d0+128];": "out of bounds",
    "ld.global.b32 %r1, [%d0+2];": "misaligned",
    "st.global.b16 [%d0+1], 1;": "misaligned",
    "st.global.b16 [%d0+126], 1;": None,
    "mov.b64 %d2, 0; ld.global.b32 %r1, [%d2];": "out of bounds",
    "mov.b64 %d2, -4; ld.global.b32 %r1, [%d2];": "out of bounds",
    "setp.gt.s32 %p1, %r0, 30; @!%p1 st.global.b32 [%d1+4], 1;": None,
    "add.s64 %d2, %d0, 256; ld.global.b32 %r1, [%d2];": None,  # may be read
    "add.s64 %d2, %d0, 256; st.global.b32 [%d2], 1;": "read-only",
    "add.s64 %d2, %d0, 260; ld.global.b32 %r1, [%d2];": "out of bounds",
    "mov.b32 %r1, 0; div.s32 %r2, %r0, %r1;": "division by zero",
    "$L: bra $L;": "no end in sight",
}


@pytest.mark.parametrize("body", ACCESSES)
def test_access(ptx: Machine, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 32 words that may be written, and one further on that may only be read."""
    monkeypatch.setattr("tests.ptx.machine.MOST", 1000)
    whole = np.zeros(100, np.uint32)
    start = whole.ctypes.data + -whole.ctypes.data % 16
    memory = Memory()
    memory.allow(start, 128, writable=True)
    memory.allow(start + 256, 4)
    kernel, wrong = ptx.load(source(f"{body} ret;")), ACCESSES[body]

    def launch() -> None:
        ptx.launch(kernel, [start.to_bytes(8, "little")], 1, 32, memory)

    if wrong is None:
        launch()
    else:
        with pytest.raises(Fault, match=f"^{wrong}: '.*' of k$"):
            launch()


def test_memory_is_what_a_launch_was_given() -> None:
    memory = Memory()
    memory.allow(100, 8, writable=True)
    memory.allow(100, 8)  # of several parameters, say
    memory.allow(108, 4)
    memory.allow(50, 0)
    assert memory.sorted() == [(100, 108, True), (108, 112, False)]
    memory.allow(111, 2)
    with pytest.raises(AssertionError, match="overlap"):
        memory.sorted()


# ---- what it refuses ----------------------------------------------------------------------------

REFUSED = {
    "add.f32 %r1, %r1, %r1;": "operation add.f32",  # ptxas may contract it
    "add.rn.ftz.f32 %r1, %r1, %r1;": "operation add.rn.ftz.f32",
    "div.full.f32 %r1, %r1, %r1;": "operation div.full.f32",
    "add.rz.f32 %r1, %r1, %r1;": "operation add.rz.f32",
    "setp.lt.and.s32 %p1, %r1, %r2, %p2;": "operation setp.lt.and.s32",
    "shfl.sync.up.b32 %r1, %r1, 1, 0, -1;": "operation shfl.sync.up.b32",
    "bar.sync 0;": "register 0",
    "atom.global.add.u32 %r1, [%d1], 1;": r"register \[%d1\]",
    "ld.shared.b32 %r1, [%d1];": "access",
    "ld.global.nc.b32 %r1, [%d1];": "registers",
    "ld.global.v2.b32 {%r1, %r2, %r3}, [%d1];": "registers",
    "ld.param.b32 %r1, [out+8];": "access",
    "ld.param.b32 %r1, [other];": "access",
    "st.param.b32 [out], %r1;": "operation st.param",
    "add.s32 %r8, %r1, %r2;": "register %r8",
    "add.s32 %r1, a, %r2;": "register a",
    "mov.u32 %r1, %laneid;": "register %laneid",
    "mov.f64 %d1, 0d3FF0000000000000;": "register 0d3FF",
    "ld.global.b128 %d2, [%d1];": "type b128",
    "ld.global.s16 %r1, [%d1];": "type s16",
}


@pytest.mark.parametrize("instruction", REFUSED)
def test_refuses(ptx: Machine, instruction: str) -> None:
    with pytest.raises(Refused, match=REFUSED[instruction]) as error:
        ptx.load(source(f"{instruction} ret;"))
    assert instruction.rstrip(";") in str(error.value)


def test_refuses_a_kernel_that_may_run_off_its_end(ptx: Machine) -> None:
    for body in ("mov.b32 %r1, 0;", "setp.eq.s32 %p1, %r0, 0; @%p1 ret;"):
        with pytest.raises(Refused, match="does not end"):
            ptx.load(source(body))


def test_entries() -> None:
    text = f".version 8.7\n.visible {source('ret;')}\n.visible .entry other()\n{{ ret; }}"
    assert list(entries(text)) == ["k", "other"]
    assert "other" not in entries(text)["k"]
