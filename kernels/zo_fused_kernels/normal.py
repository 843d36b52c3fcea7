"""Random words to standard normals, by Box-Muller, or to signs.

`portable`, the transform of the noise contract, takes integer operations, products, sums and fma:
the same bits on every device. What the constants are and why the steps fit together is told in
`zo_fused.sweeps.reference`; here they stand in the same order. `fast` takes the same steps with a
GPU's approximate units, at two thirds of the instructions. `signs` takes the bits of the words,
`hadamard` their bytes, through integers.
"""

import triton
import triton.language as tl

from .fma import fma
from .launch import INTERPRETING, TILED
from .philox import chosen, counters, counters_at, counters_from

PORTABLE = tl.constexpr("portable")
SIGNS = tl.constexpr("signs")
HADAMARD = tl.constexpr("hadamard")
HADAMARD_NVIDIA = tl.constexpr("hadamard, nvidia")
FAST_AMD = tl.constexpr("fast, amd")


def transform_of(name: str) -> str:
    """The kernels' name of a transform on the current device."""
    if name in ("fast", "hadamard") and not INTERPRETING.value:
        backend = triton.runtime.driver.active.get_current_target().backend
        if backend == "cuda":
            return f"{name}, nvidia"
        return FAST_AMD.value if name == "fast" else name
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
def pair(a, b, TRANSFORM: tl.constexpr):
    """two standard normals from two random words, by a transform"""
    one_bits = hidden(0x3F800000)
    if TRANSFORM == PORTABLE:
        z0, z1 = normal_pair(a, b, one_bits)
    else:
        z0, z1 = fast_pair(a, b, one_bits, TRANSFORM)
    return z0, z1


# ---- hadamard -----------------------------------------------------------------------------------

LINEAR = tl.constexpr(float.fromhex("0x1.b6f80cp-9"))
CUBIC = tl.constexpr(float.fromhex("0x1.228252p-33"))


@triton.jit
def near_normal(y):
    """a sum of bytes with variance 1 and kurtosis 3; y * y is exact"""
    return y * fma(y * y, CUBIC, LINEAR)


@triton.jit
def byte_pairs(word, TRANSFORM: tl.constexpr):
    """sums of neighbouring bytes, less their mean, and differences: two to a word, lo + 65536 hi

    Words add and subtract as such pairs do.
    """
    even = word & 0x00FF00FF
    if TRANSFORM == HADAMARD_NVIDIA:  # shift and mask in one
        odd = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, 0, 0x4341;", "=r,r", [word], tl.uint32, True, 1
        )
    else:
        odd = (word >> 8) & 0x00FF00FF
    return even + odd - 0x00FF00FF, even - odd


@triton.jit
def outputs(packed, TRANSFORM: tl.constexpr):
    """lo + hi and lo - hi, as near-normals, of words that pack numbers in [-2048, 2048)"""
    # A float from 2**23 on is its bits, so conversions take no instruction of their own.
    x = packed + 0x08000800  # numbers without sign
    if TRANSFORM == HADAMARD_NVIDIA:
        # 1.5 * 2**23 as bits, and the products of the halves with (1, 1) and (1, -1).
        plus = tl.inline_asm_elementwise(
            "dp2a.lo.u32.s32 $0, $1, 0x0101, 0x4B400000;", "=r,r", [x], tl.uint32, True, 1
        )
        minus = tl.inline_asm_elementwise(
            "dp2a.lo.u32.s32 $0, $1, 0xFF01, 0x4B400000;", "=r,r", [x], tl.uint32, True, 1
        )
        return near_normal(as_float(plus) - 12587008.0), near_normal(as_float(minus) - 12582912.0)
    else:
        power = hidden(0x4B000000)
        lo, hi = as_float((x & 0xFFFF) | power), as_float((x >> 16) | power)
        return near_normal((hi - 16781312.0) + lo), near_normal(lo - hi)


@triton.jit
def across_words(x0, x1, x2, x3):
    """sums of four with the signs of a 4-point Hadamard transform, in two last axes"""
    a, b, c, d = x0 + x1, x0 - x1, x2 + x3, x2 - x3
    return tl.join(tl.join(a + c, a - c), tl.join(b + d, b - d))


@triton.jit
def hadamard_tiles(first, key, id, COUNT: tl.constexpr, TRANSFORM: tl.constexpr):
    """[COUNT / 16, 8, 2] near-normals of the elements of tiles; see `zo_fused.noise.reference`"""
    w0, w1, w2, w3 = counters(first // 16, key, id, COUNT // 16, 1)
    s0, d0 = byte_pairs(w0, TRANSFORM)
    s1, d1 = byte_pairs(w1, TRANSFORM)
    s2, d2 = byte_pairs(w2, TRANSFORM)
    s3, d3 = byte_pairs(w3, TRANSFORM)
    packed = tl.join(across_words(s0, s1, s2, s3), across_words(d0, d1, d2, d3))
    z0, z1 = outputs(tl.reshape(packed, (COUNT // 16, 8)), TRANSFORM)
    return tl.join(z0, z1)


@triton.jit
def signed(x, negative):
    """x or -x"""
    return tl.where(negative, 0 - x, x)


@triton.jit
def either(word, second, TRANSFORM: tl.constexpr):
    """the sums of a word's neighbouring bytes or the differences"""
    sums, differences = byte_pairs(word, TRANSFORM)
    return tl.where(second, differences, sums)


@triton.jit
def hadamard_at(e, key, id, TRANSFORM: tl.constexpr):
    """near-normals of elements e, a block"""
    w0, w1, w2, w3 = counters_at((e >> 7) * 8 + ((e >> 3) & 7), key, id)
    i0, i1, i2 = e & 1 != 0, e & 2 != 0, e & 4 != 0
    low = either(w0, i0, TRANSFORM) + signed(either(w1, i0, TRANSFORM), i1)
    high = either(w2, i0, TRANSFORM) + signed(either(w3, i0, TRANSFORM), i1)
    z0, z1 = outputs(low + signed(high, i2), TRANSFORM)
    return tl.where(e & 64 == 0, z0, z1)


# ---- signs --------------------------------------------------------------------------------------


@triton.jit
def ones(bits):
    """-1 where the top bit is set, else 1"""
    return as_float((bits & 0x80000000) | hidden(0x3F800000))


@triton.jit
def two_bytes(word):
    """[N, 8, 2] the bits of the upper half of words [N], each as a top bit; the lower byte first"""
    x = tl.join(word << 4, word)  # shifts of shifts are one
    x = tl.join(x << 2, x)
    x = tl.reshape(tl.join(x << 1, x), (word.shape[0], 8))
    return tl.join(x << 8, x)


@triton.jit
def four_bytes(word):
    """[N, 8, 2, 2] the bits of words [N], as `two_bytes`"""
    return tl.join(two_bytes(word << 16), two_bytes(word))


@triton.jit
def signs_tiles(first, key, id, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """[COUNT / WIDTH, 8, 2, ..] signs of the elements of parts of tiles, a counter a row; see
    `zo_fused.noise.reference`"""
    row = tl.arange(0, COUNT // WIDTH)
    part = row // 8 % (128 // WIDTH)  # of the counter's bits
    n = row // (1024 // WIDTH) * 8 + row % 8
    w0, w1, w2, w3 = counters_from(first // 128, n, key, id)
    if WIDTH == 64:
        low, high = tl.where(part == 0, w0, w2), tl.where(part == 0, w1, w3)
        return ones(tl.join(four_bytes(low), four_bytes(high)))
    elif WIDTH == 32:
        return ones(four_bytes(chosen(part, w0, w1, w2, w3)))
    else:
        word = chosen(part // 2, w0, w1, w2, w3)
        return ones(two_bytes(tl.where(part % 2 == 0, word << 16, word)))


@triton.jit
def signs_at(e, key, id):
    """signs of elements e, a block"""
    w0, w1, w2, w3 = counters_at((e >> 10) * 8 + ((e >> 3) & 7), key, id)
    word = chosen((e >> 8) & 3, w0, w1, w2, w3)
    return ones(word << (31 - ((e >> 3 & 24) + (e & 7))).to(tl.uint32))


# ---- elements in order --------------------------------------------------------------------------


@triton.jit
def normals(first, key, id, COUNT: tl.constexpr, WIDTH: tl.constexpr, TRANSFORM: tl.constexpr):
    """[COUNT] standard normals or signs of elements first, first + 1, ..; a thread owns runs of
    WIDTH

    WIDTH 1 takes any first, at the price of more words. The others are for blocks: first is a
    multiple of COUNT. From TILED on they are of `hadamard` (16) and `signs`, and the shape is that
    of `blocks.load_run`.
    """
    if WIDTH >= TILED:
        if TRANSFORM == SIGNS:
            return signs_tiles(first, key, id, COUNT, WIDTH)
        else:
            return hadamard_tiles(first, key, id, COUNT, TRANSFORM)
    elif TRANSFORM == SIGNS:
        return signs_at(first + tl.arange(0, COUNT), key, id)
    elif TRANSFORM == HADAMARD or TRANSFORM == HADAMARD_NVIDIA:  # noqa: SIM109 (no Triton)
        return hadamard_at(first + tl.arange(0, COUNT), key, id, TRANSFORM)
    elif WIDTH == 1:
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
