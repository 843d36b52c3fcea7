"""The usual Triton way to perturb weights in place, as a rival: `tl.randn`, a launch a tensor."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from bench.rivals import Rival

BLOCK = 1024


@triton.jit(do_not_specialize=["seed"])
def _perturb_kernel(p_ptr, numel, seed, scale, BLOCK: tl.constexpr):
    """p += scale * tl.randn"""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < numel
    w = tl.load(p_ptr + i, mask=inside)
    z = tl.randn(seed, i)
    tl.store(p_ptr + i, (w.to(tl.float32) + scale * z).to(w.dtype), mask=inside)


def perturb_(params: Sequence[Tensor], seed: int, scale: float) -> None:
    """``p += scale * z``; contiguous tensors below 2**31 elements."""
    for number, p in enumerate(params):
        grid = (triton.cdiv(p.numel(), BLOCK),)
        _perturb_kernel[grid](
            p, p.numel(), seed + number, scale, BLOCK=BLOCK, enable_fp_fusion=True
        )


class TlRandn(Rival):
    """The published step of MeZO by that kernel."""

    def add(self, coeff: float, seed: int) -> None:
        perturb_([p.data for p in self.params], seed, coeff)
