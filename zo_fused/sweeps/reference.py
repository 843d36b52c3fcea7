"""The executable specification: the sweeps in plain PyTorch, in rising complexity.

Slow and obvious. Every other backend equals these functions bit for bit, so each line
here is a promise: change one and the contract version changes with it (``docs/noise.md``). As a
backend it serves any device, in bounded scratch memory.

Noise is that of `zo_fused.noise.reference`. Arguments as in `zo_fused.sweeps.signatures`, already
checked: parameters are contiguous.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from zo_fused.noise.reference import fma, normal, philox, random_bits, rounding_bits, stochastic
from zo_fused.sweeps import script as scripts
from zo_fused.sweeps.arithmetic import square_root
from zo_fused.sweeps.numbers import EXACT

TRANSFORMS = EXACT
CHUNK = 1 << 18  # elements at a time; a multiple of 4. Bounds the temporaries, changes no bit.


def why_not(device_type: str) -> str | None:
    """None: the reference serves every device (float64 arithmetic included)."""
    if device_type in ("mps", "meta"):
        return f"the reference needs float64 arithmetic, which {device_type!r} tensors lack"
    return None


def _chunks(numel: int) -> Iterator[tuple[int, int]]:
    for start in range(0, numel, CHUNK):
        yield start, min(CHUNK, numel - start)


def _integers(*tensors: Tensor) -> Iterator[tuple[int, ...]]:
    return zip(*(t.tolist() for t in tensors), strict=True)


def _store(
    weights: Tensor, acc: Tensor, rounding: Tensor | None, param_id: int, offset: int
) -> None:
    """weights = acc, rounded; their elements are ``offset, offset + 1, ..`` of a parameter."""
    if rounding is not None and weights.dtype != torch.float32:
        random = rounding_bits(acc.numel(), int(rounding), param_id, offset, acc.device)
        acc = stochastic(acc, weights.dtype, random.view(acc.shape))
    weights.copy_(acc)


def key_(out: Tensor, counter: Tensor, ahead: int, interval: int, name: int, seed: int) -> None:
    """The key of a stream whose step is known on the device alone (`zo_fused.noise.derive_key`).

    Args:
        out: int64 [1].
        counter: int64 [].
        ahead, interval: the step, or window, is ``(counter + ahead) // interval``.
        name: ``query | purpose << 32``.
        seed: of the run, in two's complement.
    """
    number = torch.div(counter + ahead, interval, rounding_mode="floor")
    low, high, _, _ = philox(number, name, seed)
    out.copy_(low | high << 32)


def bits_(outs: Sequence[Tensor], ids: Tensor, offsets: Tensor, keys: Tensor) -> None:
    """outs[i][e] = word of element ``offsets[i] + e``; int64 tensors."""
    for out, (id_, offset, key) in zip(outs, _integers(ids, offsets, keys), strict=True):
        flat = out.view(-1)
        for start, size in _chunks(flat.numel()):
            flat[start : start + size] = random_bits(size, key, id_, offset + start, out.device)


def normal_(
    outs: Sequence[Tensor],
    ids: Tensor,
    offsets: Tensor,
    keys: Tensor,
    transform: str = "portable",
) -> None:
    """outs[i][e] = standard normal or sign of element ``offsets[i] + e``; float32 tensors."""
    for out, (id_, offset, key) in zip(outs, _integers(ids, offsets, keys), strict=True):
        flat = out.view(-1)
        for start, size in _chunks(flat.numel()):
            z = normal(size, key, id_, offset + start, out.device, transform)
            flat[start : start + size] = z


def dense_(
    params: Sequence[Tensor],
    ids: Tensor,
    offsets: Tensor,
    keys: Tensor,
    coeffs: Tensor,
    decay: Tensor,
    rounding: Tensor | None = None,
    transform: str = "portable",
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
                z = normal(size, key, id_, offset + start, param.device, transform)
                acc = fma(c[k], z, acc)
            _store(part, acc, rounding, id_, offset + start)


def unpacked(mask: Tensor, offset: int, start: int, size: int) -> Tensor:
    """Bits start .. start + size of a tensor's packed mask, bool."""
    first = offset % 8 + start  # of the first byte on
    some = mask[first // 8 : (first + size + 7) // 8]
    places = torch.arange(8, dtype=torch.uint8, device=mask.device)
    bits = (some[:, None] >> places & 1).flatten()
    return bits[first % 8 : first % 8 + size].bool()


def shaped_(
    params: Sequence[Tensor],
    shapes: Sequence[Tensor],
    ids: Tensor,
    offsets: Tensor,
    keys: Tensor,
    coeffs: Tensor,
    decay: Tensor,
    rounding: Tensor | None = None,
    transform: str = "portable",
) -> None:
    """`dense_` with a shape for each parameter. If that is

    * empty: nothing more.
    * float32, of the parameter's shape: each z_k is divided by its root, ``z_k / sqrt(shape)``,
      root and quotient those of IEEE 754.
    * uint8, a packed mask: a weight whose bit is 0 stays as it is, without decay. Element e of the
      full parameter has bit ``e % 8`` of byte ``e // 8 - offset // 8``.
    """
    for i, (param, shape) in enumerate(zip(params, shapes, strict=True)):
        flat, (id_, offset) = param.view(-1), (int(row[i]) for row in (ids, offsets))
        for start, size in _chunks(flat.numel()):
            here = slice(start, start + size)
            weights = flat[here].float()
            acc = weights * decay[i]
            scaled = shape.numel() and shape.dtype == torch.float32
            root = square_root(shape.view(-1)[here]) if scaled else None
            for k, key in enumerate(keys.tolist()):
                z = normal(size, key, id_, offset + start, param.device, transform)
                acc = fma(coeffs[i, k], z if root is None else z / root, acc)
            if shape.numel() and shape.dtype == torch.uint8:
                acc = torch.where(unpacked(shape, offset, start, size), acc, weights)
            _store(flat[here], acc, rounding, id_, offset + start)


def dense_steps_(
    params: Sequence[Tensor],
    ids: Tensor,
    offsets: Tensor,
    keys: Tensor,
    script: Tensor,
    coeffs: Tensor,
    decay: Tensor,
    transform: str = "portable",
) -> None:
    """The dense sweeps of a script (`zo_fused.sweeps.script`), one after the other, each
    rounded."""
    for rows in scripts.dense(keys, script, coeffs, decay):
        dense_(params, ids, offsets, *rows, transform)


def moments_(
    params: Sequence[Tensor],
    firsts: Sequence[Tensor],
    seconds: Sequence[Tensor],
    ids: Tensor,
    offsets: Tensor,
    keys: Tensor,
    grads: Tensor,
    restores: Tensor,
    coeffs: Tensor,
    decay: Tensor,
    rule: str,
    rounding: Tensor | None = None,
    transform: str = "portable",
    squares: Tensor | None = None,
) -> None:
    """The estimate ``g = sum_k grads[k] * z_k`` goes into the moments, the moments into p:

    * ``m = beta * m + gain * g``; without `firsts`, ``m = gain * g`` and nothing is kept;
    * rule "momentum": ``s = m``; "sign": ``s = sign(m)``; "adam": ``v = beta2 * v + gain2 * g * g``
      and ``s = m / (sqrt(v) + eps)``;
    * ``p = round(decay * p + sum_k restores[k] * z_k + step * s)``.

    Columns of coeffs: beta, gain, beta2, gain2, eps, step. m is rounded to nearest where it is
    kept in 16 bits; s takes it unrounded. Root and quotient are those of IEEE 754.

    With `squares` rule "adam" keeps neither: ``m = gain * g``, ``v = sum_k squares[k] * z_k**2``.

    Rule "hizoo" has squares, and H in `seconds`: with v as above ``acc = acc + sum_k restores[k] *
    (z_k / sqrt(H))``, then ``H = max(beta2 * H + v * H, eps)`` and ``p = round(acc + step *
    (gain * g) / sqrt(H))`` with the new H.
    """
    stream_keys = keys.tolist()
    rows = zip(params, _integers(ids, offsets), grads, restores, coeffs, decay, strict=True)
    for i, (
        param,
        (id_, offset),
        grad,
        restore,
        (beta, gain, beta2, gain2, eps, step),
        d,
    ) in enumerate(rows):
        flat = param.view(-1)
        for start, size in _chunks(flat.numel()):
            here = slice(start, start + size)
            acc = flat[here].float() * d
            g, v = torch.zeros_like(acc), torch.zeros_like(acc)
            root = square_root(seconds[i].view(-1)[here]) if rule == "hizoo" else None
            for k, key in enumerate(stream_keys):
                z = normal(size, key, id_, offset + start, param.device, transform)
                g = fma(grad[k], z, g)
                acc = fma(restore[k], z if root is None else z / root, acc)
                if squares is not None:
                    v = fma(squares[i, k] * z, z, v)
            m = g * gain
            if rule == "hizoo":
                hessian = seconds[i].view(-1)[here]
                hessian.copy_(_floored(fma(v, hessian, hessian * beta2), eps))
                s = m / square_root(hessian)
                _store(flat[here], fma(step, s, acc), rounding, id_, offset + start)
                continue
            if firsts:
                first = firsts[i].view(-1)[here]
                m = fma(gain, g, first.float() * beta)
                first.copy_(m)
            if rule == "adam":
                if squares is None:
                    second = seconds[i].view(-1)[here]
                    v = second.copy_(fma(g * gain2, g, second * beta2))
                s = m / (square_root(v) + eps)
            else:
                s = (m > 0).float() - (m < 0).float() if rule == "sign" else m
            _store(flat[here], fma(step, s, acc), rounding, id_, offset + start)


def _floored(x: Tensor, floor: Tensor) -> Tensor:
    """x, or the floor where x is not above it (also where it is no number)."""
    return torch.where(x > floor, x, floor)


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


def _streams(
    count: int, ids: Tensor | None, offsets: Tensor | None
) -> Iterator[tuple[int, ...]] | list[tuple[int, int]]:
    """(id, offset) of every parameter; where there is no rounding stream, they don't matter."""
    return [(0, 0)] * count if ids is None or offsets is None else _integers(ids, offsets)


def lowrank_(
    params: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    coeffs: Tensor,
    decay: Tensor,
    ids: Tensor | None = None,
    offsets: Tensor | None = None,
    rounding: Tensor | None = None,
) -> None:
    """p = round(decay * p + coeff * (u @ v.T)), p seen as (size(0), numel/size(0))."""
    streams = _streams(len(params), ids, offsets)
    rows = zip(params, us, vs, coeffs, decay, streams, strict=True)
    for param, u, v, c, d, (id_, offset) in rows:
        if not param.numel():
            continue
        matrix = _as_matrix(param)
        for part in _row_blocks(matrix):
            block = matrix[part]
            acc = fma(c, _outer(u[part], v), block.float() * d)
            _store(block, acc, rounding, id_, offset + part.start * matrix.shape[1])


def factor_momentum_(
    moments: Sequence[Tensor], us: Sequence[Tensor], coeffs: Tensor, decay: Tensor
) -> None:
    """moment = decay * moment + coeff * u, in three roundings."""
    for moment, u, c, d in zip(moments, us, coeffs, decay, strict=True):
        moment.copy_(moment * d + u * c)


def lowrank_momentum_(
    params: Sequence[Tensor],
    moments: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    coeffs: Tensor,
    decay: Tensor,
    ids: Tensor | None = None,
    offsets: Tensor | None = None,
    rounding: Tensor | None = None,
) -> None:
    """moment = beta * moment + grad * u, then p = round(decay * p + a @ v.T) with
    a = step * moment + restore * u, both as `factor_momentum_` has it. Columns of coeffs: beta,
    grad, restore, step. The moment of an empty parameter stays as it is."""
    rows = zip(params, moments, us, vs, coeffs, decay.split(1), strict=True)
    for i, (param, moment, u, v, c, d) in enumerate(rows):
        if not param.numel():
            continue
        beta, grad, restore, step = c.split(1)
        factor_momentum_([moment], [u], grad, beta)
        a = moment.clone()
        factor_momentum_([a], [u], restore, step)
        id_, offset = (None if row is None else row[i : i + 1] for row in (ids, offsets))
        lowrank_([param], [a], [v], torch.ones_like(d), d, id_, offset, rounding)
