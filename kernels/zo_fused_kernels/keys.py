"""Stream keys of a step whose number only the device knows."""

import triton
import triton.language as tl
from torch import Tensor

from .philox import counters_at


@triton.jit(do_not_specialize=["out_ptr", "counter_ptr", "ahead", "interval", "name", "seed"])
def _key_kernel(out_ptr, counter_ptr, ahead, interval, name, seed):
    """the key of a stream"""
    number = (tl.load(counter_ptr) + ahead) // interval
    low, high, _, _ = counters_at(number, seed, name)
    tl.store(out_ptr, low.to(tl.int64) | (high.to(tl.int64) << 32))


def key(out: Tensor, counter: Tensor, *numbers: int) -> None:
    """Write a stream key; see `zo_fused.sweeps.backends.multi_tensor`."""
    _key_kernel[(1,)](out, counter, *numbers, num_warps=1)
