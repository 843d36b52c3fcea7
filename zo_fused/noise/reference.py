"""Words, normals, signs and stochastic rounding in plain PyTorch: the noise contract, executable.

The contract in prose, with test vectors: docs/noise.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zo_fused.noise.streams import MASK32, PHILOX_MULTIPLIERS, PHILOX_ROUNDS, PHILOX_WEYL


def philox(n: Tensor, param_id: int, key: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words of Philox4x32-10 for counters ``(n low, n high, id low, id high)``.

    n: int64 of any shape, ``0 <= n < 2**62``. Returns int64 tensors with values below 2**32.
    """
    c0, c1 = n & MASK32, n >> 32
    c2, c3 = torch.full_like(n, param_id & MASK32), torch.full_like(n, param_id >> 32 & MASK32)
    k0, k1 = key & MASK32, key >> 32 & MASK32
    for _ in range(PHILOX_ROUNDS):
        # int64 products wrap modulo 2**64, which keeps all 64 bits of the unsigned product.
        p0, p1 = c0 * PHILOX_MULTIPLIERS[0], c2 * PHILOX_MULTIPLIERS[1]
        c0, c2 = (p1 >> 32 & MASK32) ^ c1 ^ k0, (p0 >> 32 & MASK32) ^ c3 ^ k1
        c1, c3 = p1 & MASK32, p0 & MASK32
        k0, k1 = (k0 + PHILOX_WEYL[0]) & MASK32, (k1 + PHILOX_WEYL[1]) & MASK32
    return c0, c1, c2, c3


def _counters(numel: int, offset: int, device: torch.device) -> tuple[Tensor, int]:
    """Counters that cover elements ``offset .. offset + numel``, and the first one's surplus."""
    first = offset // 4
    last = -(-(offset + numel) // 4)
    return torch.arange(first, last, device=device, dtype=torch.int64), offset - 4 * first


def random_bits(numel: int, key: int, param_id: int, offset: int, device: torch.device) -> Tensor:
    """Word ``e % 4`` of counter ``e // 4`` for elements ``e`` from ``offset``, as int64 [numel]."""
    n, skip = _counters(numel, offset, device)
    return torch.stack(philox(n, param_id, key), dim=-1).flatten()[skip : skip + numel]


def fma(a: Tensor | float, b: Tensor | float, c: Tensor | float) -> Tensor:
    """Fused multiply-add of float32 values: ``a * b + c`` rounded once.

    The product is exact in float64. The sum is rounded to odd (Boldo and Melquiond 2008: round
    towards zero and set the last bit where inexact), which makes the second rounding, to float32,
    correct.
    """
    a, b, c = (_float32(x).double() for x in (a, b, c))
    p = a * b
    s = p + c
    b_virtual = s - p
    error = (p - (s - b_virtual)) + (c - b_virtual)  # TwoSum: s + error == p + c exactly
    bits = s.view(torch.int64)
    inexact_even = (error != 0) & (bits & 1 == 0) & torch.isfinite(s)
    # Towards the exact sum: the neighbour further from zero if error and s agree in sign.
    away = (error > 0) == (s > 0)
    bits = torch.where(inexact_even, torch.where(away, bits + 1, bits - 1), bits)
    return bits.view(torch.float64).float()


def _float32(x: Tensor | float) -> Tensor:
    if isinstance(x, Tensor):
        return x.float()
    return torch.tensor(x, dtype=torch.float32, device="cpu")


def _float(bits: Tensor) -> Tensor:
    """The float32 with the given bits (int64 below 2**32)."""
    return bits.to(torch.int32).view(torch.float32)  # the conversion keeps the low 32 bits


def _bits(x: Tensor) -> Tensor:
    """The bits of a float32, as int64 below 2**32."""
    return x.view(torch.int32).to(torch.int64) & MASK32


# Minimax coefficients, rounded to float32; `examples/fit_normal.py` derives them.
LOG = (-2850767.75, 1281372.875, -651781.875, 366677.21875, -165749.09375)


SQRT = tuple(
    float.fromhex(x)
    for x in (
        "0x1.71a5560p-11",
        "-0x1.d083400p-11",
        "0x1.5e08920p-11",
        "-0x1.a26ff20p-13",
    )
)


SIN = tuple(float.fromhex(x) for x in ("0x1.921f320p-1", "-0x1.4a9ac40p-4", "0x1.3e202a0p-9"))


COS = tuple(
    float.fromhex(x) for x in ("0x1.0p+0", "-0x1.3bd3a20p-2", "0x1.03b1620p-6", "-0x1.4ea9e80p-12")
)


RSQRT_MAGIC = 0x5F200000


def _horner(coefficients: Sequence[float], x: Tensor) -> Tensor:
    """Polynomial with the coefficient of x**k at index k, highest first, one fma a degree."""
    value: Tensor | float = coefficients[-1]
    for coefficient in reversed(coefficients[:-1]):
        value = fma(value, x, coefficient)
    return _float32(value)


def radius(a: Tensor) -> Tensor:
    """sqrt(-ln u) for ``u = float32((a & 0x7fffffff) | 1) * 2**-31``, from a random word.

    With x the bits of the unscaled u, ``float(0x4f000000 - x)`` is 2**23 times a piecewise
    linear -log2(u); what it lacks is ``w(v) * h(v)`` with v the centred mantissa. The square root
    is a bit-level guess y of 1/sqrt(t) and one cubic correction, which also carries
    sqrt(ln(2) * 2**-23).
    """
    bits = _bits((a & 0x7FFFFFFF | 1).float())
    linear = (0x4F000000 - bits).float()
    v = _float(bits & 0x7FFFFF | 0x3F800000) - 1.5
    t = fma(fma(-v, v, 0.25), _horner(LOG, v), linear)
    y = _float(RSQRT_MAGIC - (_bits(t) >> 1))
    q = t * y
    return q * _horner(SQRT, q * y)


def normal_pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two standard normals, float32, from two random words: Box-Muller without libm.

    With s in [-1, 1) from the low 23 bits of b, the angle is (pi/4) * (s + 1), in one quadrant:
    its cosine and sine are (C - S)/sqrt(2) and (C + S)/sqrt(2) with S and C the sine and cosine
    of (pi/4) * s. The sqrt(2) cancels against the 2 in sqrt(-2 ln u). The top bits of a and b
    are the two signs.
    """
    r = radius(a)
    s = fma(_float(b & 0x7FFFFF | 0x3F800000), 2.0, -3.0)
    y = s * s
    sin = _horner(SIN, y) * s
    cos = _horner(COS, y) * r
    z0 = _float(_bits(fma(-sin, r, cos)) ^ a & 0x80000000)
    z1 = _float(_bits(fma(sin, r, cos)) ^ b & 0x80000000)
    return z0, z1


# What makes variance and kurtosis of `hadamard` 1 and 3; `examples/fit_hadamard.py` derives them.
LINEAR, CUBIC = float.fromhex("0x1.b6f80cp-9"), float.fromhex("0x1.228252p-33")


def hadamard(words: Sequence[Tensor]) -> Tensor:
    """Sixteen near-normals, float32 [..., 16], from the four words of a counter.

    x_0 .. x_7 are the bytes of the words' low halves, in order, x_8 .. x_15 those of the high
    halves; each less its mean, 127.5. ``y = H x`` with H the 16-point Hadamard matrix, integers
    since every y is a sum or difference of all, and ``z = y (LINEAR + CUBIC y^2)``.
    """
    x = [word >> shift & 0xFF for high in (0, 16) for word in words for shift in (high, high + 8)]
    y = torch.stack(x, dim=-1)
    for size in (1, 2, 4, 8):
        low, high = y.unflatten(-1, (-1, 2, size)).unbind(-2)
        y = torch.stack((low + high, low - high), dim=-2).flatten(-3)
    y[..., 0] -= 2040
    y = y.float()
    return y * fma(y * y, CUBIC, LINEAR)


def signs(words: Sequence[Tensor]) -> Tensor:
    """+1 or -1, float32 [..., 128], from the four words of a counter: -1 where a bit is set, the
    lowest first."""
    bits = torch.stack(tuple(words), dim=-1)[..., None] >> torch.arange(32, device=words[0].device)
    return (1 - 2 * (bits & 1)).float().flatten(-2)


def _tiles(
    of_words: Callable[[Sequence[Tensor]], Tensor],
    size: int,
    numel: int,
    key: int,
    param_id: int,
    offset: int,
    device: torch.device,
) -> Tensor:
    """Tiles of `size` elements have eight counters: each makes eight neighbouring elements, eight
    that are 64 further, and so on."""
    first, last = offset // size, -(-(offset + numel) // size)
    n = torch.arange(8 * first, 8 * last, device=device, dtype=torch.int64)
    z = of_words(philox(n, param_id, key)).view(-1, 8, size // 64, 8)
    return z.transpose(1, 2).flatten()[offset - size * first :][:numel]


def normal(
    numel: int,
    key: int,
    param_id: int,
    offset: int,
    device: torch.device,
    transform: str = "portable",
) -> Tensor:
    """Standard normals of elements ``offset .. offset + numel`` of a parameter, float32 [numel]; or
    signs, if the transform is "signs"; or near-normals, if it is "hadamard"."""
    if transform == "hadamard":
        return _tiles(hadamard, 128, numel, key, param_id, offset, device)
    if transform == "signs":
        return _tiles(signs, 1024, numel, key, param_id, offset, device)
    n, skip = _counters(numel, offset, device)
    w0, w1, w2, w3 = philox(n, param_id, key)
    z = (*normal_pair(w0, w1), *normal_pair(w2, w3))
    return torch.stack(z, dim=-1).flatten()[skip : skip + numel]


def rounding_bits(numel: int, key: int, param_id: int, offset: int, device: torch.device) -> Tensor:
    """16-bit numbers of elements ``offset .. offset + numel``, int64 [numel].

    The words of the stream, in order, are cut in two: element e has the low half of word e // 2
    if e is even, the high half if it is odd.
    """
    first = offset // 2
    words = random_bits(-(-(offset + numel) // 2) - first, key, param_id, first, device)
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=-1).flatten()
    return halves[offset - 2 * first :][:numel]


def stochastic(x: Tensor, dtype: torch.dtype, random: Tensor) -> Tensor:
    """float32 x rounded to a neighbour in a 16-bit dtype, to each with the probability that makes
    the mean x. Infinities and NaN stay. float32 has nothing to round.

    Args:
        random: as many 16-bit numbers, uniform, as int64.

    A number below the bits that stay is added to those that go, and they are cut off. For bfloat16
    that is the lower half of a float32. Times 2**-112 a float32 has the exponent bits of a float16
    and lacks 13 of its own, subnormals included.
    """
    if dtype == torch.float32:
        return x
    if dtype == torch.bfloat16:
        cut = _bits(x) + random >> 16
        nan = 0x7FC0
    else:
        bits = _bits(x * 2.0**-112)
        magnitude = ((bits & 0x7FFFFFFF) + (random >> 3) >> 13).clamp(max=0x7C00)
        cut = bits >> 16 & 0x8000 | magnitude
        nan = 0x7E00
    return torch.where(x.isnan(), nan, cut).to(torch.int16).view(dtype)
