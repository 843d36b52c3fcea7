"""Every operation of the PTX machine against Python's integers and NumPy's floats."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.builds import shared_folder

from tests.ptx.machine import Machine, Memory, machine

Array = np.ndarray[Any, np.dtype[Any]]
THREADS, BLOCKS = 256, 8
COUNT = THREADS * BLOCKS

TYPES: dict[str, Any] = {
    **{f"{letter}16": np.uint16 for letter in ("b", "u", "f", "bf")},
    **{f"{letter}32": np.uint32 for letter in "bu"},
    **{f"{letter}64": np.uint64 for letter in "bu"},
    "s16": np.int16,
    "s32": np.int32,
    "s64": np.int64,
    "f32": np.float32,
    "pred": np.uint16,
    "f32x2": np.dtype((np.float32, 2)),
}
# Values that are rare among random ones.
INTEGERS = [0, 1, 2, 31, 32, 33, 63, 64, 65, 0x7F, 0x80, 0xFF, 2**15, 2**31 - 1, 2**31, 2**63]
FLOATS = [0.0, 1.0, math.inf, math.nan, 2.0**-149, 2.0**-126, 2.0**-127, 65504, 65519, 65520]
FLOATS += [2.0**-24, 2.0**-25, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-8, 3e38, 0.1]


def values(type_: str, seed: int) -> Array:
    """Of a type, all over its range, with the special ones."""
    random = np.random.default_rng(seed)
    if type_ == "f32x2":
        return np.stack([values("f32", seed), values("f32", seed + 100)], axis=1)
    dtype = np.dtype(TYPES[type_])
    if type_ == "pred":
        return random.integers(0, 2, COUNT).astype(dtype)
    if type_ == "f32":
        made = random.standard_normal(COUNT) * 2.0 ** random.integers(-40, 17, COUNT)
        made[: COUNT // 2] = random.standard_normal(COUNT // 2)
        special = np.array([*FLOATS, *(-x for x in FLOATS)])
    else:
        made = random.integers(0, 2**64, COUNT, dtype=np.uint64)
        made >>= random.integers(0, 64, COUNT).astype(np.uint64)
        special = np.array([x % 2**64 for n in INTEGERS for x in (n, -n)], dtype=np.uint64)
    made[random.choice(COUNT, COUNT // 2, replace=False)] = random.choice(special, COUNT // 2)
    return made.astype(dtype)


# ---- what each operation makes of numbers -------------------------------------------------------


def truncated(x: int, y: int) -> int:
    return abs(x) // abs(y) * (-1 if (x < 0) != (y < 0) else 1)


def fused(a: Any, b: Any, c: Any) -> Any:
    return np.float32(np.longdouble(a) * np.longdouble(b) + np.longdouble(c))


def each(function: Callable[..., Any]) -> Callable[..., Any]:
    """Of both halves."""
    return lambda *pairs: [function(*of) for of in zip(*pairs, strict=True)]


def flushed(x: Any) -> Any:
    return np.copysign(np.float32(0), x) if 0 < abs(x) < 2.0**-126 else x


def permuted(a: int, b: int, selector: int) -> int:
    taken = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    digits = [selector >> 4 * i & 15 for i in range(4)]
    made = [taken[d] if d < 8 else 255 * (taken[d - 8] >= 128) for d in digits]
    return int.from_bytes(bytes(made), "little")


def dot2(a: int, b: int, c: int) -> int:
    low, high = np.array([b], np.uint32).view(np.int8)[:2].tolist()
    return c + (a & 0xFFFF) * int(low) + (a >> 16) * int(high)


def half(x: Any) -> int:
    return 0x7FFF if np.isnan(x) else int(np.float16(x).view(np.uint16))


def bfloat16(x: Any) -> int:
    made = torch.tensor(float(x), dtype=torch.float32).bfloat16().view(torch.int16)
    return 0x7FFF if np.isnan(x) else int(made) % 2**16


def approximate(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda x: np.float32(function(np.float64(x)))


def flushing(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *xs: flushed(np.float32(function(*map(flushed, xs))))


Case = tuple[str, tuple[str, ...], Callable[..., Any]]  # types of result and operands
CASES: dict[str, Case] = {
    "mov.pred": ("pred", ("pred",), lambda a: a),
    "not.pred": ("pred", ("pred",), lambda a: not a),
    "and.pred": ("pred", ("pred", "pred"), operator.and_),
    "or.pred": ("pred", ("pred", "pred"), operator.or_),
    "cvta.to.global.u64": ("u64", ("u64",), lambda a: a),
    "mul.hi.u32": ("u32", ("u32", "u32"), lambda a, b: a * b >> 32),
    "prmt.b32": ("b32", ("b32", "b32", "b32"), permuted),
    "shf.l.wrap.b32": ("b32", ("b32",) * 3, lambda a, b, n: (b << 32 | a) << n % 32 >> 32),
    "shf.r.wrap.b32": ("b32", ("b32",) * 3, lambda a, b, n: (b << 32 | a) >> n % 32),
    "dp2a.lo.u32.s32": ("u32", ("b32", "b32", "u32"), dot2),
    "neg.f32": ("b32", ("b32",), lambda bits: bits ^ 2**31),
    "abs.f32": ("b32", ("b32",), lambda bits: bits % 2**31),
    "sqrt.rn.f32": ("f32", ("f32",), np.sqrt),
    "div.rn.f32": ("f32", ("f32", "f32"), operator.truediv),
    "mul.rn.ftz.f32": ("f32", ("f32", "f32"), flushing(operator.mul)),
    "setp.num.f32": ("pred", ("f32", "f32"), lambda a, b: a == a and b == b),
    "setp.nan.f32": ("pred", ("f32", "f32"), lambda a, b: a != a or b != b),
    "cvt.f32.f16": ("f32", ("f16",), lambda a: np.uint16(a).view(np.float16).astype(np.float32)),
    "cvt.f32.bf16": ("f32", ("bf16",), lambda a: np.uint32(a << 16).view(np.float32)),
    "cvt.rn.f16.f32": ("f16", ("f32",), half),
    "cvt.rn.bf16.f32": ("bf16", ("f32",), bfloat16),
    "cvt.rn.f16x2.f32": ("b32", ("f32", "f32"), lambda a, b: half(a) << 16 | half(b)),
    "cvt.rn.bf16x2.f32": ("b32", ("f32", "f32"), lambda a, b: bfloat16(a) << 16 | bfloat16(b)),
    "lg2.approx.ftz.f32": ("f32", ("f32",), flushing(approximate(np.log2))),
    "sqrt.approx.ftz.f32": ("f32", ("f32",), flushing(approximate(np.sqrt))),
}
for name in ("sin", "cos"):
    circular = approximate(getattr(np, name))
    CASES[f"{name}.approx.f32"] = ("f32", ("f32",), circular)
    CASES[f"{name}.approx.ftz.f32"] = ("f32", ("f32",), flushing(circular))
for name in ("add", "sub", "mul"):
    rounded = getattr(operator, name)
    CASES[f"{name}.rn.f32"] = ("f32", ("f32", "f32"), rounded)
    CASES[f"{name}.rn.f32x2"] = ("f32x2", ("f32x2", "f32x2"), each(rounded))
CASES["fma.rn.f32"] = ("f32", ("f32",) * 3, fused)
CASES["fma.rn.f32x2"] = ("f32x2", ("f32x2",) * 3, each(fused))
for to, from_ in (("u16", "u32"), ("u32", "u16"), ("u32", "u64"), ("u64", "u32"), ("s64", "s32")):
    CASES[f"cvt.{to}.{from_}"] = (to, (from_,), lambda a: a)
CASES["setp.lt.s16"] = ("pred", ("s16", "s16"), operator.lt)
CASES["cvt.s16.s8"] = ("b16", ("b16",), lambda a: (a & 0xFF ^ 0x80) - 0x80)
for letter in "us":
    CASES[f"cvt.rn.f32.{letter}32"] = ("f32", (f"{letter}32",), np.float32)
    CASES[f"mul.wide.{letter}32"] = (f"{letter}64", (f"{letter}32",) * 2, operator.mul)
    wide = (f"{letter}32", f"{letter}32", f"{letter}64")
    CASES[f"mad.wide.{letter}32"] = (wide[2], wide, lambda a, b, c: a * b + c)
for width in (16, 32, 64):
    b = f"b{width}"
    CASES[f"mov.{b}"] = (b, (b,), lambda a: a)
    CASES[f"selp.{b}"] = (b, (b, b, "pred"), lambda a, b, p: a if p else b)
    CASES[f"and.{b}"] = (b, (b, b), operator.and_)
    CASES[f"or.{b}"] = (b, (b, b), operator.or_)
    CASES[f"shl.{b}"] = (b, (b, "u32"), lambda a, n: a << n if n < 64 else 0)
    CASES[f"setp.eq.{b}"] = ("pred", (b, b), operator.eq)
    CASES[f"setp.ne.{b}"] = ("pred", (b, b), operator.ne)
for width in (32, 64):
    b, u, s = f"b{width}", f"u{width}", f"s{width}"
    CASES[f"add.{b}"] = (b, (b, b), operator.add)
    CASES[f"sub.{b}"] = (b, (b, b), operator.sub)
    CASES[f"neg.{b}"] = (b, (b,), operator.neg)
    CASES[f"not.{b}"] = (b, (b,), operator.invert)
    CASES[f"xor.{b}"] = (b, (b, b), operator.xor)
    CASES[f"mul.lo.{b}"] = (b, (b, b), operator.mul)
    CASES[f"mad.lo.{b}"] = (b, (b, b, b), lambda a, b, c: a * b + c)
    CASES[f"bfe.{u}"] = (
        u, (u, "u32", "u32"), lambda a, n, m: a >> (n & 255) & ((1 << (m & 255)) - 1),
    )  # fmt: skip
    for type_ in (u, s):
        CASES[f"shr.{type_}"] = (type_, (type_, "u32"), lambda a, n: a >> n)
        CASES[f"min.{type_}"] = (type_, (type_, type_), min)
        CASES[f"max.{type_}"] = (type_, (type_, type_), max)
        CASES[f"div.{type_}"] = (type_, (type_, type_), truncated)
for name in ("lt", "le", "gt", "ge"):
    for type_ in ("u32", "s32", "u64", "s64", "f32"):
        CASES[f"setp.{name}.{type_}"] = ("pred", (type_, type_), getattr(operator, name))
CASES["setp.eq.f32"] = ("pred", ("f32", "f32"), operator.eq)

# What is no operation on values: `test_machine.py` has it.
OTHERS = {"ld", "st", "ld.param", "unpack", "pack", "bra", "ret", "shfl.sync.idx.b32"}


# ---- a kernel of one operation ------------------------------------------------------------------


def width_of(type_: str) -> int:
    return int(8 * np.dtype(TYPES[type_]).itemsize)


def kernel(op: str, result: str, operands: tuple[str, ...]) -> str:
    """Thread n applies an operation to the n-th elements of arrays, and stores what it gives."""
    pointers = ", ".join(f".param .u64 p{i}" for i in range(len(operands) + 1))
    lines = [
        f".entry one({pointers}) {{",
        ".reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<9>; .reg .b64 %d<9>; .reg .b64 %a<9>;",
        "mov.u32 %r7, %ctaid.x; mov.u32 %r8, %ntid.x; mov.u32 %r6, %tid.x;",
        "mad.lo.s32 %r8, %r7, %r8, %r6;",
    ]
    names, registers = [], {16: "h", 32: "r", 64: "d"}
    for i, type_ in enumerate((*operands, result)):
        bits = width_of(type_)
        name = f"%{registers[bits]}{i}"
        lines.append(f"ld.param.u64 %a{i}, [p{i}];")
        lines.append(f"mad.wide.u32 %a{i}, %r8, {bits // 8}, %a{i};")
        if i < len(operands):
            lines.append(f"ld.global.b{bits} {name}, [%a{i}];")
            if type_ == "pred":
                lines.append(f"setp.ne.b16 %p{i}, {name}, 0;")
        names.append(f"%p{i}" if type_ == "pred" else name)
    *given, made = names
    lines.append(f"{op} {', '.join((made, *given))};")
    if result == "pred":
        lines.append(f"selp.b16 {name}, 1, 0, {made};")
    lines.append(f"st.global.b{width_of(result)} [%a{len(operands)}], {name};")
    return "\n".join([*lines, "ret;", "}"])


@pytest.fixture(scope="module")
def ptx(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return machine(shared_folder(tmp_path_factory))


def test_every_operation_has_a_case(ptx: Machine) -> None:
    assert ptx.operations.keys() == CASES.keys() | OTHERS


@pytest.mark.parametrize("op", CASES)
def test_operation(ptx: Machine, op: str) -> None:
    result, operands, function = CASES[op]
    inputs = [values(type_, seed) for seed, type_ in enumerate(operands)]
    if op.startswith("div.") and not op.endswith("f32"):
        inputs[1][inputs[1] == 0] = 3
    out = np.zeros(COUNT, TYPES[result])
    memory = Memory()
    for array in inputs:
        memory.allow(array.ctypes.data, array.nbytes)
    memory.allow(out.ctypes.data, out.nbytes, writable=True)
    passed = [array.ctypes.data.to_bytes(8, "little") for array in (*inputs, out)]
    ptx.launch(ptx.load(kernel(op, result, operands)), passed, BLOCKS, THREADS, memory)

    floats = {"f32", "f32x2"}
    with np.errstate(all="ignore"):
        rows = zip(
            *(x if t in floats else x.tolist() for x, t in zip(inputs, operands, strict=True)),
            strict=True,
        )
        made = [function(*row) for row in rows]
    if result in floats:
        wanted: Array = np.array(made, dtype=np.float32).view(np.uint32)
        wanted[np.isnan(wanted.view(np.float32))] = 0x7FFFFFFF  # NVIDIA's
        got: Array = out.view(np.uint32)
    else:
        wanted = np.array([int(x) % 2 ** width_of(result) for x in made], np.uint64)
        got = out.view(f"u{width_of(result) // 8}").astype(np.uint64)
    different = (got != wanted).reshape(COUNT, -1).any(axis=1).nonzero()[0]
    assert not len(different), [x[different[0]] for x in (*inputs, got, wanted)]
