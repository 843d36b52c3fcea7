"""Scripts: several sweeps over the same weights, written down for one pass.

A script is int64 [S, 3] on the CPU, a row a sweep, in their order:

* the index of its first direction: in `keys` (dense) or among the products (low rank),
* that of its second, or -1 (low rank: -1),
* the index in `keys` of the key of its rounding stream, or -1: to nearest.

Its scalars are ``coeffs``, float32 [P, S, 2] (dense: for either direction) or [P, S] (low rank),
and ``decay``, float32 [P, S]. This file takes a script apart into the sweeps that it stands for:
what it means, and what a backend does that has nothing better.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor


def _rounding(keys: Tensor, index: int) -> Tensor | None:
    return keys[index : index + 1] if index >= 0 else None


def dense(
    keys: Tensor, script: Tensor, coeffs: Tensor, decay: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """Keys, coeffs, decay and rounding of one ``dense_`` after the other."""
    for sweep, (first, second, rounding) in enumerate(script.tolist()):
        directions = [first] if second < 0 else [first, second]
        c = coeffs[:, sweep, : len(directions)].contiguous()
        yield keys[directions], c, decay[:, sweep].contiguous(), _rounding(keys, rounding)


def lowrank(
    keys: Tensor, script: Tensor, coeffs: Tensor, decay: Tensor
) -> Iterator[tuple[int, tuple[Tensor, Tensor, Tensor | None]]]:
    """The product of one ``lowrank_`` after the other, and its coeffs, decay and rounding."""
    for sweep, (product, _, rounding) in enumerate(script.tolist()):
        c, d = coeffs[:, sweep].contiguous(), decay[:, sweep].contiguous()
        yield product, (c, d, _rounding(keys, rounding))
