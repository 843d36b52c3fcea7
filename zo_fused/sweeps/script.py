"""Scripts: several dense sweeps over the same weights, written down for one pass.

A script is int64 [S, 3] on the CPU, a row a sweep, in their order: the index in `keys` of its first
direction; that of its second, or -1; that of its rounding stream, or -1: to nearest.

Its scalars are ``coeffs``, float32 [P, S, 2], for either direction, and ``decay``, float32 [P, S].
This file takes a script apart into the sweeps that it stands for: what it means, and what a backend
does that has nothing better.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor


def dense(
    keys: Tensor, script: Tensor, coeffs: Tensor, decay: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """Keys, coeffs, decay and rounding of one ``dense_`` after the other."""
    for sweep, (first, second, rounding) in enumerate(script.tolist()):
        directions = [first] if second < 0 else [first, second]
        c = coeffs[:, sweep, : len(directions)].contiguous()
        key = keys[rounding : rounding + 1] if rounding >= 0 else None
        yield keys[directions], c, decay[:, sweep].contiguous(), key
