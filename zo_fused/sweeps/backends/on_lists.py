"""What all backends share: from sweeps that are prepared to functions on lists."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from zo_fused.recording import capturing
from zo_fused.sweeps.signatures import SWEEPS, Lists

Sweep = Callable[..., None]  # of the rows of a signature
Prepare = Callable[[str, Lists, Tensor | None, Tensor | None], Sweep]


class Kept:
    """The sweeps of the calls made last, and all that CUDA graphs have recorded: a graph reads
    their tables whenever it is replayed, and nothing tells when it is gone."""

    def __init__(self, size: int = 64) -> None:
        self._size = size
        self._sweeps: OrderedDict[Hashable, Sweep] = OrderedDict()
        self._recorded: dict[Hashable, Sweep] = {}
        self.made = 0  # so far, for tests

    def get(self, key: Hashable, make: Callable[[], Sweep]) -> Sweep:
        """What `make` returned the last time that it was called under this key."""
        if key in self._recorded:
            return self._recorded[key]
        if capturing():  # nothing may be waited for; `make` raises if something must be copied
            sweep = self._sweeps.pop(key) if key in self._sweeps else make()
            return self._recorded.setdefault(key, sweep)
        if key in self._sweeps:
            self._sweeps.move_to_end(key)
        else:
            if len(self._sweeps) == self._size:
                if torch.cuda.is_initialized():  # a kernel may still read it, on any stream
                    torch.cuda.synchronize()
                self._sweeps.popitem(last=False)
            self.made += 1
            self._sweeps[key] = make()
        return self._sweeps[key]


def functions(prepare: Prepare, kept: Kept) -> dict[str, Callable[..., None]]:
    """Every sweep by name, as a function of all its arguments.

    A call finds the sweep that was prepared for an earlier one as long as no address, shape, dtype,
    id or offset is another. Sweeps hold no parameters, so that their memory can be freed.
    """

    def function(name: str) -> Callable[..., None]:
        def call(*args: Any, **options: Any) -> None:
            lists, ids, offsets, rows = SWEEPS[name].split(args, options)
            if lists[0]:
                key = (name, *map(_places, lists), _numbers(ids), _numbers(offsets))
                kept.get(key, lambda: prepare(name, lists, ids, offsets))(*rows)

        call.__name__ = name
        return call

    return {name: function(name) for name in SWEEPS}


def _places(tensors: Sequence[Tensor]) -> Hashable:
    return tuple((t.data_ptr(), t.dtype, t.shape, t.device) for t in tensors)


def _numbers(row: Tensor | None) -> Hashable:
    return None if row is None else row.numpy().tobytes()


def lowrank_momentum(
    prepare: Prepare, lists: Lists, ids: Tensor | None, offsets: Tensor | None
) -> Sweep:
    """The sweep ``lowrank_momentum_``, of others, as `zo_fused.sweeps.reference` has it."""
    used = [i for i, param in enumerate(lists[0]) if param.numel()]
    some = len(used) < len(lists[0])
    params, moments, us, vs = ([tensors[i] for i in used] for tensors in lists)
    ids, offsets = (None if row is None else row[used] for row in (ids, offsets))
    if not used:
        return lambda *rows: None
    moments = [moment.detach() for moment in moments]  # held, so that no address comes back
    sums = [torch.empty_like(u) for u in us]
    update = prepare("factor_momentum_", (moments, us), None, None)
    add = prepare("factor_momentum_", (sums, us), None, None)
    multiply = prepare("lowrank_", (params, sums, vs), ids, offsets)
    ones = torch.ones(len(used), dtype=torch.float32, device=params[0].device)

    def sweep(coeffs: Tensor, decay: Tensor, rounding: Tensor | None = None) -> None:
        if some:
            coeffs, decay = coeffs[used], decay[used]
        beta, grad, restore, step = coeffs.unbind(1)
        update(grad, beta)
        torch._foreach_copy_(sums, moments)
        add(restore, step)
        multiply(ones, decay, rounding)

    return sweep
