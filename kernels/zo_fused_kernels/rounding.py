"""Conversions between float32 and the dtypes of weights."""

import triton
import triton.language as tl

from .launch import INTERPRETING
from .philox import halves


@triton.jit
def widen(w):
    """float32(w), exact"""
    # Triton's interpreter gets subnormal bfloat16 wrong.
    if INTERPRETING and tl.bfloat16 == w.dtype:
        bits = w.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return bits.to(tl.float32, bitcast=True)
    else:
        return w.to(tl.float32)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """x rounded to DTYPE, to nearest, ties to even"""
    # Triton's interpreter truncates to bfloat16.
    if INTERPRETING and tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        rounded = tl.where(x == x, rounded, 0x7FC0)  # the carry could run out of a NaN
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)


@triton.jit
def narrow_randomly(x, random, DTYPE: tl.constexpr):
    """x rounded to a neighbour in a 16-bit DTYPE, without bias; random: uint32 below 2**16"""
    if tl.bfloat16 == DTYPE:
        cut = (x.to(tl.uint32, bitcast=True) + random) >> 16
        cut = tl.where(x == x, cut, 0x7FC0)
    else:
        # Times 2**-112 a float32 has the exponent bits of a float16, subnormals included.
        bits = (x * 2.0**-112).to(tl.uint32, bitcast=True)
        magnitude = tl.minimum(((bits & 0x7FFFFFFF) + (random >> 3)) >> 13, 0x7C00)
        cut = tl.where(x == x, ((bits >> 16) & 0x8000) | magnitude, 0x7E00)
    return cut.to(tl.uint16).to(DTYPE, bitcast=True)


@triton.jit
def rounded(
    x, DTYPE: tl.constexpr, rounding_ptr, first, id, COUNT: tl.constexpr, WIDTH: tl.constexpr
):
    """[COUNT] x, elements first, first + 1, .. of a parameter, in DTYPE: to nearest, or given the
    key of a rounding stream at random (float32 has nothing to round)"""
    if rounding_ptr is None or tl.float32 == DTYPE:
        return narrow(x, DTYPE)
    else:
        random = halves(first, tl.load(rounding_ptr), id, COUNT, WIDTH)
        return narrow_randomly(x, random, DTYPE)
