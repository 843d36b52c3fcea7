"""The portable transform of the noise contract: random words to standard normals. Floor 2.

Box-Muller out of integer operations, products, sums and fma: the same bits on every device. What
the constants are and why the steps fit together is told in `zo_fused.reference`; here they stand
in the same order.
"""

import triton
import triton.language as tl

from .fma import fma
from .philox import words

LOG = tl.constexpr((-2850767.75, 1281372.875, -651781.875, 366677.21875, -165749.09375))
SQRT = tl.constexpr(
    (
        float.fromhex("0x1.71a5560p-11"),
        float.fromhex("-0x1.d083400p-11"),
        float.fromhex("0x1.5e08920p-11"),
        float.fromhex("-0x1.a26ff20p-13"),
    )
)
SIN = tl.constexpr(
    (
        float.fromhex("0x1.921f320p-1"),
        float.fromhex("-0x1.4a9ac40p-4"),
        float.fromhex("0x1.3e202a0p-9"),
    )
)
COS = tl.constexpr(
    (
        1.0,
        float.fromhex("-0x1.3bd3a20p-2"),
        float.fromhex("0x1.03b1620p-6"),
        float.fromhex("-0x1.4ea9e80p-12"),
    )
)
RSQRT_MAGIC = tl.constexpr(0x5F200000)


@triton.jit
def as_float(bits):
    """the float32 with the given bits"""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def as_bits(x):
    """the bits of a float32, uint32"""
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def hidden(VALUE: tl.constexpr):
    """VALUE as a scalar uint32 that the compiler takes for unknown"""
    # NVIDIA's three-input logic takes one immediate operand: ``x & A | B`` is two instructions,
    # or one if B comes in a register. Grids have one axis, so the last program id is zero. This
    # saves one instruction in 35 an element of a dense sweep.
    return tl.program_id(2).to(tl.uint32) + VALUE


@triton.jit
def horner(x, COEFFICIENTS: tl.constexpr, DEGREE: tl.constexpr):
    """polynomial with the coefficient of x**k at index k, highest first, one fma a degree"""
    value = fma(x, COEFFICIENTS[DEGREE], COEFFICIENTS[DEGREE - 1])
    for i in tl.static_range(2, DEGREE + 1):
        value = fma(value, x, COEFFICIENTS[DEGREE - i])
    return value


@triton.jit
def radius(a, one_bits):
    """sqrt(-ln u), u = float32((a & 0x7fffffff) | 1) * 2**-31"""
    bits = as_bits(((a & 0x7FFFFFFF) | 1).to(tl.int32).to(tl.float32))
    linear = (0x4F000000 - bits).to(tl.int32).to(tl.float32)
    v = as_float((bits & 0x7FFFFF) | one_bits) - 1.5
    t = fma(fma(-v, v, 0.25), horner(v, LOG, 4), linear)
    y = as_float(RSQRT_MAGIC.value - (as_bits(t) >> 1))
    q = t * y
    return q * horner(q * y, SQRT, 3)


@triton.jit
def normal_pair(a, b, one_bits):
    """two standard normals, float32, from two random words"""
    r = radius(a, one_bits)
    s = fma(as_float((b & 0x7FFFFF) | one_bits), 2.0, -3.0)
    y = s * s
    sin = horner(y, SIN, 2) * s
    cos = horner(y, COS, 3) * r
    z0 = as_bits(fma(-sin, r, cos)) ^ (a & 0x80000000)
    z1 = as_bits(fma(sin, r, cos)) ^ (b & 0x80000000)
    return as_float(z0), as_float(z1)


@triton.jit
def normals(block, key, id, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """[BLOCK] standard normals of a block of a parameter; a thread owns runs of WIDTH (4, 8)"""
    # Each join adds a last axis, which stays within its thread: no data moves.
    w0, w1, w2, w3 = words(block, key, id, BLOCK, WIDTH, 0)
    if WIDTH == 8:
        w4, w5, w6, w7 = words(block, key, id, BLOCK, WIDTH, 1)
        w0, w1, w2, w3 = tl.join(w0, w4), tl.join(w1, w5), tl.join(w2, w6), tl.join(w3, w7)
    even, odd = normal_pair(tl.join(w0, w2), tl.join(w1, w3), hidden(0x3F800000))
    return tl.reshape(tl.join(even, odd), (BLOCK,))
