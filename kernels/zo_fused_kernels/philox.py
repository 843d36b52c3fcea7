"""Philox4x32-10 and its counters. Floor 1."""

import triton
import triton.language as tl


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
    return x.to(tl.uint32), (x >> 32).to(tl.uint32)


@triton.jit
def words(block, key, id, BLOCK: tl.constexpr, WIDTH: tl.constexpr, PART: tl.constexpr):
    """four words of counter PART of every group of WIDTH elements in a block of a parameter"""
    # Element e has word e % 4 of counter e // 4. The first counter of a block is a multiple of
    # BLOCK / 4, so adding to its low word never carries.
    low, high = split(block * (BLOCK // 4))
    k0, k1 = split(key)
    id_low, id_high = split(id)
    groups = tl.arange(0, BLOCK // WIDTH).to(tl.uint32)
    return philox(low + (groups * (WIDTH // 4) + PART), high, id_low, id_high, k0, k1)


@triton.jit
def locate(offset, BLOCK: tl.constexpr):
    """number of this program's block in the full parameter, and where it starts in the tensor

    The tensor holds the parameter from element ``offset``; the first block may start before it.
    """
    pid = tl.program_id(0).to(tl.int64)
    offset = offset.to(tl.int64)
    return offset // BLOCK + pid, pid * BLOCK - offset % BLOCK


@triton.jit
def covered(start, n, BLOCK: tl.constexpr):
    """[BLOCK] which elements of a block that starts at ``start`` are among a tensor's n"""
    offs = tl.arange(0, BLOCK)
    low = tl.maximum(-start, 0).to(tl.int32)
    high = tl.minimum(n - start, BLOCK).to(tl.int32)
    return (offs >= low) & (offs < high)
