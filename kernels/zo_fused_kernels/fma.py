"""Fused multiply-add, the same on a GPU and in Triton's interpreter."""

import triton
import triton.language as tl

from .launch import INTERPRETING


@triton.jit
def fma(a, b, c):
    """a * b + c, float32, rounded once"""
    # The interpreter's own fma rounds twice before Triton 3.8 or so. There the product is formed
    # in float64, where it is exact, and the sum is rounded to odd (towards zero, then the last bit
    # set where inexact; Boldo and Melquiond 2008), which makes the rounding to float32 correct.
    if INTERPRETING:
        p = tl.cast(a, tl.float64) * tl.cast(b, tl.float64)
        c = tl.cast(c, tl.float64)
        s = p + c
        c_in_s = s - p
        error = (p - (s - c_in_s)) + (c - c_in_s)  # s + error == p + c, exactly
        bits = s.to(tl.int64, bitcast=True)
        inexact_even = (error != 0) & (bits & 1 == 0) & (tl.abs(s) < float("inf"))
        step = tl.where((error > 0) == (s > 0), 1, -1)  # away from zero, or towards it
        bits = tl.where(inexact_even, bits + step, bits)
        return bits.to(tl.float64, bitcast=True).to(tl.float32)
    else:
        return tl.fma(a, b, c)
