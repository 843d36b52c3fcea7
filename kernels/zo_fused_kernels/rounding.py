"""Conversions between float32 and the dtypes of weights. Floor 1."""

import triton
import triton.language as tl

from .launch import INTERPRETING


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
