"""The sweeps of GPU backends: from lists of tensors to launches over tables.

Triton and CUDA differ only in `Kernels`. Keys, coefficients and decay stay on the device, where the
kernels read them: nothing waits for the host, and a sweep can be captured in a CUDA graph (once it
has run or been prepared, so that its table exists).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from zo_fused.sweeps import script as scripts
from zo_fused.sweeps.backends import on_lists, table
from zo_fused.sweeps.backends.table import Launch
from zo_fused.sweeps.signatures import SWEEPS, Lists


class Kernels(Protocol):
    """What a GPU backend provides.

    Beside these sizes, a function for every operator of `zo_fused.sweeps.signatures` but
    ``lowrank_momentum_``, under its name without the underscore. It is one launch, on the current
    stream, and takes a `Launch`, which has the lists, and the operator's rows in their order, all
    of them: ``dense(launch, keys, coeffs, decay, rounding, transform)``. Tensors are contiguous and
    on the launch's device. ``dense_steps`` may be missing.

    And ``key``: `zo_fused.sweeps.reference.key_` on the current stream of the tensors' device.
    """

    TILE: tuple[int, int]  # rows and columns of a matrix that a program of a low-rank sweep takes

    def chunk(self, elements: int, units: int) -> int:
        """Elements of a parameter that a program of a sweep over noise takes, if the sweep is over
        so many, on a device with so many multiprocessors."""

    def key(self, out: Tensor, counter: Tensor, *numbers: int) -> None: ...


class MultiTensor:
    """The sweeps over the kernels that `load` returns (loaded at the first sweep)."""

    def __init__(self, load: Callable[[], Kernels]) -> None:
        self._load = load
        self.kept = on_lists.Kept()
        self.functions = on_lists.functions(self.prepare, self.kept) | {"key_": self.key_}

    def key_(self, out: Tensor, counter: Tensor, *numbers: int) -> None:
        """As `zo_fused.sweeps.reference.key_`, in one launch."""
        with _current(out.device)():
            self._load().key(out, counter, *numbers)

    def prepare(
        self, name: str, lists: Lists, ids: Tensor | None, offsets: Tensor | None
    ) -> Callable[..., None]:
        """A sweep over these tensors, which must stay alive and where they are. It takes the rows
        of the operator."""
        if name == "lowrank_momentum_":
            return on_lists.lowrank_momentum(self.prepare, lists, ids, offsets)
        kernels, kernel, complete = self._load(), name.removesuffix("_"), SWEEPS[name].complete
        if not hasattr(kernels, kernel):
            return _one_by_one(self.prepare("dense_", lists, ids, offsets))
        device = lists[0][0].device
        current = _current(device)
        with current():
            launches = _launches(name, lists, ids, offsets, kernels)

        def sweep(*given: Any, **options: Any) -> None:
            rows = [
                row.contiguous() if isinstance(row, Tensor) else row
                for row in complete(given, options)
            ]
            run = getattr(kernels, kernel)
            with current():
                for launch in launches:
                    run(launch, *rows)

        return sweep


def _current(device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """Contexts in which kernels are launched to a device."""
    if device.type == "cuda":
        return functools.partial(torch.cuda.device, device)
    return contextlib.nullcontext


def _units(device: torch.device) -> int:
    """Multiprocessors of a device."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _launches(
    name: str, lists: Lists, ids: Tensor | None, offsets: Tensor | None, kernels: Kernels
) -> list[Launch]:
    first, *others = lists
    device, chunk = first[0].device, 0
    zeros = [0] * len(first)
    id_list = zeros if ids is None else ids.tolist()
    starts = zeros if offsets is None else offsets.tolist()
    if name == "lowrank_":
        us, vs = others
        rows = table.lowrank_rows(first, us, vs, id_list, starts, kernels.TILE)
    else:
        states = [state for state in others if state]
        chunk = kernels.chunk(sum(map(torch.Tensor.numel, first)), _units(device))
        rows = table.noise_rows(first, id_list, starts, states, chunk)
    return table.launches(rows, device, chunk)


def _one_by_one(dense: Callable[..., None]) -> Callable[..., None]:
    """``dense_steps_`` where there is no kernel for it."""

    def sweep(
        keys: Tensor, script: Tensor, coeffs: Tensor, decay: Tensor, transform: str = "portable"
    ) -> None:
        for rows in scripts.dense(keys, script, coeffs, decay):
            dense(*rows, transform)

    return sweep
