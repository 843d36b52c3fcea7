"""The executable specification: noise and sweeps in plain PyTorch, in rising complexity.

Floor 1. Slow and obvious. Every other backend equals these functions bit for bit, so each line
here is a promise: change one and the contract version changes with it (``docs/noise.md``).

Unsigned 32-bit words live in int64 tensors; ``fma`` is exact; nothing here calls libm.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from zo_fused.streams import MASK32, PHILOX_MULTIPLIERS, PHILOX_ROUNDS, PHILOX_WEYL

CHUNK = 1 << 18  # elements at a time; a multiple of 4. Bounds the temporaries, changes no bit.


# ---- random words -------------------------------------------------------------------------------


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


# ---- normals ------------------------------------------------------------------------------------


def fma(a: Tensor | float, b: Tensor | float, c: Tensor | float) -> Tensor:
    """Fused multiply-add of float32 values: ``a * b + c`` rounded once.

    The product is exact in float64. The sum is rounded to odd (Boldo and Melquiond 2008: round
    towards zero and set the last bit where inexact), which makes the second rounding, to float32,
    correct.
    """
    a, b, c = (torch.as_tensor(x, dtype=torch.float32).double() for x in (a, b, c))
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
    return torch.as_tensor(value)


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


def normal(numel: int, key: int, param_id: int, offset: int, device: torch.device) -> Tensor:
    """Standard normals of elements ``offset .. offset + numel`` of a parameter, float32 [numel]."""
    n, skip = _counters(numel, offset, device)
    w0, w1, w2, w3 = philox(n, param_id, key)
    z = (*normal_pair(w0, w1), *normal_pair(w2, w3))
    return torch.stack(z, dim=-1).flatten()[skip : skip + numel]


# ---- sweeps -------------------------------------------------------------------------------------
# The five operators of the backends. Arguments as in `zo_fused/_ops.py`, already checked:
# parameters are contiguous; one row of `ids`, `offsets`, `coeffs`, `decay` belongs to each.


def _chunks(numel: int) -> Iterator[tuple[int, int]]:
    for start in range(0, numel, CHUNK):
        yield start, min(CHUNK, numel - start)


def _integers(*tensors: Tensor) -> Iterator[tuple[int, ...]]:
    return zip(*(t.tolist() for t in tensors), strict=True)


def bits_(outs: Sequence[Tensor], ids: Tensor, offsets: Tensor, keys: Tensor) -> None:
    """outs[i][e] = word of element ``offsets[i] + e``; int64 tensors."""
    for out, (id_, offset, key) in zip(outs, _integers(ids, offsets, keys), strict=True):
        flat = out.view(-1)
        for start, size in _chunks(flat.numel()):
            flat[start : start + size] = random_bits(size, key, id_, offset + start, out.device)


def normal_(outs: Sequence[Tensor], ids: Tensor, offsets: Tensor, keys: Tensor) -> None:
    """outs[i][e] = standard normal of element ``offsets[i] + e``; float32 tensors."""
    for out, (id_, offset, key) in zip(outs, _integers(ids, offsets, keys), strict=True):
        flat = out.view(-1)
        for start, size in _chunks(flat.numel()):
            flat[start : start + size] = normal(size, key, id_, offset + start, out.device)


def dense_(
    params: Sequence[Tensor],
    ids: Tensor,
    offsets: Tensor,
    keys: Tensor,
    coeffs: Tensor,
    decay: Tensor,
) -> None:
    """p = round(decay * p + sum_k coeffs[k] * z_k), one fma a direction, in the order of k."""
    stream_keys = keys.tolist()
    rows = zip(params, _integers(ids, offsets), coeffs, decay, strict=True)
    for param, (id_, offset), c, d in rows:
        flat = param.view(-1)
        for start, size in _chunks(flat.numel()):
            part = flat[start : start + size]
            acc = part.float() * d
            for k, key in enumerate(stream_keys):
                acc = fma(c[k], normal(size, key, id_, offset + start, param.device), acc)
            part.copy_(acc)


def _as_matrix(param: Tensor) -> Tensor:
    return param.view(param.shape[0] if param.dim() else 1, -1) if param.numel() else param


def _outer(u: Tensor, v: Tensor) -> Tensor:
    """Rows of u (a, r) against v (n, r): sum_q u[:, q] v[:, q], an fma chain in the order of q."""
    dot = u[:, 0, None] * v[None, :, 0]
    for q in range(1, u.shape[1]):
        dot = fma(u[:, q, None], v[None, :, q], dot)
    return dot


def _row_blocks(matrix: Tensor) -> Iterator[slice]:
    rows = max(1, CHUNK // matrix.shape[1])
    for start in range(0, matrix.shape[0], rows):
        yield slice(start, start + rows)


def lowrank_(
    params: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    coeffs: Tensor,
    decay: Tensor,
) -> None:
    """p = round(decay * p + coeff * (u @ v.T)), p seen as (size(0), numel/size(0))."""
    for param, u, v, c, d in zip(params, us, vs, coeffs, decay, strict=True):
        if not param.numel():
            continue
        matrix = _as_matrix(param)
        for rows in _row_blocks(matrix):
            block = matrix[rows]
            block.copy_(fma(c, _outer(u[rows], v), block.float() * d))


def lowrank_momentum_(
    params: Sequence[Tensor],
    moments: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    coeffs: Tensor,
    decay: Tensor,
) -> None:
    """moment = beta * moment + grad * u, then p = round(decay * p + a @ v.T) with
    a = restore * u + step * moment. Columns of coeffs: beta, grad, restore, step."""
    for param, moment, u, v, c, d in zip(params, moments, us, vs, coeffs, decay, strict=True):
        if not param.numel():
            continue
        beta, grad, restore, step = c
        moment.copy_(fma(grad, u, moment * beta))
        a = fma(step, moment, u * restore)
        matrix = _as_matrix(param)
        for rows in _row_blocks(matrix):
            block = matrix[rows]
            block.copy_(block.float() * d + _outer(a[rows], v))
