"""Philox4x32-10 and its counters."""

import triton
import triton.language as tl

from .launch import TILED


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """four words of Philox4x32-10; counter c, key k, all uint32, scalars or blocks"""
    # The product is written out in 64 bits because `umulhi` beside a low product costs two
    # multiplications on NVIDIA. Words that are scalars are worked out once a thread: two of the
    # twenty products when only c0 is a block.
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def split(x):
    """low and high word of an int64"""
    x = tl.cast(x, tl.int64)  # interpreted loops count in Python's integers
    return x.to(tl.uint32), (x >> 32).to(tl.uint32)


@triton.jit
def counters_from(first, n, key, id):
    """four words each of the counters first + n, a block

    They must not pass a multiple of 2**32.
    """
    low, high = split(first)
    k0, k1 = split(key)
    id_low, id_high = split(id)
    return philox(low + n.to(tl.uint32), high, id_low, id_high, k0, k1)


@triton.jit
def counters(first, key, id, COUNT: tl.constexpr, STRIDE: tl.constexpr):
    """[COUNT] four words each of the counters first, first + STRIDE, .."""
    return counters_from(first, tl.arange(0, COUNT) * STRIDE, key, id)


@triton.jit
def counters_at(n, key, id):
    """four words each of any counters n, a block"""
    low, high = split(n)
    k0, k1 = split(key)
    id_low, id_high = split(id)
    return philox(low, high, id_low, id_high, k0, k1)


@triton.jit
def chosen(i, w0, w1, w2, w3):
    """word i % 4 of four"""
    return tl.where(i & 2 == 0, tl.where(i & 1 == 0, w0, w1), tl.where(i & 1 == 0, w2, w3))


@triton.jit
def word_at(e, key, id):
    """the words of elements e, a block"""
    w0, w1, w2, w3 = counters_at(e >> 2, key, id)
    return chosen(e, w0, w1, w2, w3)


@triton.jit
def half_at(e, key, id):
    """the 16-bit numbers of elements e, a block: the words of the stream cut in two"""
    word = word_at(e >> 1, key, id)
    return tl.where(e & 1 == 0, word & 0xFFFF, word >> 16)


@triton.jit
def halves(first, key, id, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """[COUNT] the 16-bit numbers of elements first, first + 1, ..; first and WIDTH as in
    `normal.normals`"""
    if WIDTH == 1:
        return half_at(first + tl.arange(0, COUNT), key, id)
    elif WIDTH >= TILED:
        row = tl.arange(0, COUNT // WIDTH)
        n = row // 8 * WIDTH + row % 8
        if WIDTH == 4 * TILED:
            return tl.join(
                halves_of_four(first // 8, n, key, id), halves_of_four(first // 8, n + 32, key, id)
            )
        elif WIDTH == 2 * TILED:
            return halves_of_four(first // 8, n, key, id)
        else:
            return halves_of_two(first // 8, n, key, id)
    else:
        return tl.reshape(halves_of(first // 8, tl.arange(0, COUNT // 8), key, id), (COUNT,))


@triton.jit
def halves_of_four(first, n, key, id):
    """[N, 8, 2, 2] `halves_of` every eighth counter"""
    return tl.join(halves_of_two(first, n, key, id), halves_of_two(first, n + 16, key, id))


@triton.jit
def halves_of_two(first, n, key, id):
    """[N, 8, 2] the same"""
    return tl.join(halves_of(first, n, key, id), halves_of(first, n + 8, key, id))


@triton.jit
def halves_of(first, n, key, id):
    """[N, 8] the 16-bit numbers of counters first + n, a block, which have one high word"""
    w0, w1, w2, w3 = counters_from(first, n, key, id)
    # One counter serves eight elements of a thread. Each join adds a last axis, which stays within
    # its thread: no data moves.
    w = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return tl.reshape(tl.join(w & 0xFFFF, w >> 16), (n.shape[0], 8))
