"""Random words to standard normals, by Box-Muller, or to signs.

`portable`, the transform of the noise contract, takes integer operations, products, sums and fma:
the same bits on every device. What the constants are and why the steps fit together is told in
`zo_fused.sweeps.reference`; here they stand in the same order. `fast` takes the same steps with a
GPU's approximate units, at two thirds of the instructions. `rademacher` takes the top bits of the
words.
"""

import triton
import triton.language as tl

from .fma import fma
from .launch import INTERPRETING
from .philox import counters, counters_at

PORTABLE = tl.constexpr("portable")
RADEMACHER = tl.constexpr("rademacher")
FAST_AMD = tl.constexpr("fast, amd")


def transform_of(name: str) -> str:
    """The kernels' name of a transform on the current device."""
    if name == "fast" and not INTERPRETING.value:
        backend = triton.runtime.driver.active.get_current_target().backend
        return FAST_AMD.value if backend == "hip" else "fast, nvidia"
    return name


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
def negative(x):
    """-x, float32"""
    # Triton before 3.8 makes ``0.0 - x`` of ``-x``, an instruction of its own: one in 35 an element
    # of a dense sweep. Of this product LLVM makes a sign, which takes none.
    return x * -1.0


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
    t = fma(fma(negative(v), v, 0.25), horner(v, LOG, 4), linear)
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
    z0 = as_bits(fma(negative(sin), r, cos)) ^ (a & 0x80000000)
    z1 = as_bits(fma(sin, r, cos)) ^ (b & 0x80000000)
    return as_float(z0), as_float(z1)


# 2 ln 2, and 31 times it, rounded up: the radicand below is never negative.
TWO_LN2 = tl.constexpr(float.fromhex("0x1.62e42ep+0"))
TWO_LN2_31 = tl.constexpr(float.fromhex("0x1.57cd0ep+5"))
HALF_PI = tl.constexpr(float.fromhex("0x1.921fb6p+0"))


@triton.jit
def approximate(x, PTX: tl.constexpr, GCN: tl.constexpr, TRANSFORM: tl.constexpr):
    """x through one approximate instruction"""
    if TRANSFORM == FAST_AMD:
        return tl.inline_asm_elementwise(GCN, "=v,v", [x], tl.float32, True, 1)
    else:
        return tl.inline_asm_elementwise(PTX, "=f,f", [x], tl.float32, True, 1)


@triton.jit
def fast_pair(a, b, one_bits, TRANSFORM: tl.constexpr):
    """about the `normal_pair` of the same words: within 4e-6 / r + 6e-6 max(1, r), r the radius"""
    u = ((a & 0x7FFFFFFF) | 1).to(tl.int32).to(tl.float32)  # times 2**-31: uniform in (0, 1]
    x = as_float((b & 0x7FFFFF) | one_bits)  # the angle is (pi/2) (x - 1)
    if INTERPRETING:
        radius = tl.sqrt(fma(tl.log2(u), -TWO_LN2, TWO_LN2_31))
        sin, cos = tl.sin(x * HALF_PI), tl.cos(x * HALF_PI)
    else:
        log = approximate(u, "lg2.approx.ftz.f32 $0, $1;", "v_log_f32 $0, $1", TRANSFORM)
        square = fma(log, -TWO_LN2, TWO_LN2_31)
        radius = approximate(square, "sqrt.approx.ftz.f32 $0, $1;", "v_sqrt_f32 $0, $1", TRANSFORM)
        angle = x * (0.25 if TRANSFORM == FAST_AMD else HALF_PI)  # AMD's units count turns
        sin = approximate(angle, "sin.approx.ftz.f32 $0, $1;", "v_sin_f32 $0, $1", TRANSFORM)
        cos = approximate(angle, "cos.approx.ftz.f32 $0, $1;", "v_cos_f32 $0, $1", TRANSFORM)
    # cos(angle - pi/2) and sin(angle - pi/2)
    z0 = as_float(as_bits(radius) ^ (a & 0x80000000)) * sin
    z1 = as_float(as_bits(negative(radius)) ^ (b & 0x80000000)) * cos
    return z0, z1


@triton.jit
def sign(a, one_bits):
    """+1 or -1 by the top bit of a random word"""
    return as_float((a & 0x80000000) | one_bits)


@triton.jit
def pair(a, b, TRANSFORM: tl.constexpr):
    """two standard normals or signs from two random words, by a transform"""
    one_bits = hidden(0x3F800000)
    if TRANSFORM == PORTABLE:
        z0, z1 = normal_pair(a, b, one_bits)
    elif TRANSFORM == RADEMACHER:
        z0, z1 = sign(a, one_bits), sign(b, one_bits)
    else:
        z0, z1 = fast_pair(a, b, one_bits, TRANSFORM)
    return z0, z1


@triton.jit
def normals(first, key, id, COUNT: tl.constexpr, WIDTH: tl.constexpr, TRANSFORM: tl.constexpr):
    """[COUNT] standard normals or signs of elements first, first + 1, ..; a thread owns runs of
    WIDTH

    WIDTH 4 and 8 are for blocks: first is a multiple of COUNT. WIDTH 1 takes any first, and four
    times as many words.
    """
    if WIDTH == 1:
        e = first + tl.arange(0, COUNT)
        w0, w1, w2, w3 = counters_at(e >> 2, key, id)
        early = e & 2 == 0
        z0, z1 = pair(tl.where(early, w0, w2), tl.where(early, w1, w3), TRANSFORM)
        return tl.where(e & 1 == 0, z0, z1)
    else:
        # Each join adds a last axis, which stays within its thread: no data moves.
        w0, w1, w2, w3 = counters(first // 4, key, id, COUNT // WIDTH, WIDTH // 4)
        if WIDTH == 8:
            w4, w5, w6, w7 = counters(first // 4 + 1, key, id, COUNT // WIDTH, 2)
            w0, w1, w2, w3 = tl.join(w0, w4), tl.join(w1, w5), tl.join(w2, w6), tl.join(w3, w7)
        even, odd = pair(tl.join(w0, w2), tl.join(w1, w3), TRANSFORM)
        return tl.reshape(tl.join(even, odd), (COUNT,))
