"""The sweeps of GPU backends: from lists of tensors to launches over tables.

Triton and CUDA differ only in `Kernels`. Keys, coefficients and decay stay on the device, where the
kernels read them: nothing waits for the host, and a sweep can be captured in a CUDA graph (once it
has run or been prepared, so that its table exists).

Every sweep is prepared first, which finds its launches. The functions on lists do it at every call,
`zo_fused.sweeps.prepared` keeps what `MultiTensor.prepare` returns.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from zo_fused.sweeps import script as scripts
from zo_fused.sweeps.backends import table
from zo_fused.sweeps.backends.table import Launch


class Kernels(Protocol):
    """What a GPU backend provides. Each function is one launch, on the current stream.

    `launch` has the parameters; tensors are contiguous, on its device and as in
    `zo_fused/sweeps/operators.py`; rounding is the int64 [1] key of a rounding stream or None. One
    function may be missing: ``dense_steps(launch, keys, script, coeffs, decay, transform)``, the
    dense sweeps of a script.
    """

    CHUNK: int  # elements of a parameter that a program of a sweep over noise takes
    TILE: tuple[int, int]  # rows and columns of a matrix that a program of a low-rank sweep takes

    def bits(self, launch: Launch, keys: Tensor) -> None:
        """Fill int64 tensors with words; keys: [P]."""

    def normal(self, launch: Launch, keys: Tensor, transform: str) -> None:
        """Fill float32 tensors with normals or signs; keys: [P]."""

    def dense(
        self,
        launch: Launch,
        keys: Tensor,
        coeffs: Tensor,
        decay: Tensor,
        rounding: Tensor | None,
        transform: str,
    ) -> None:
        """p = round(decay * p + sum_k coeffs[k] * z_k)"""

    def moments(
        self,
        launch: Launch,
        keys: Tensor,
        grads: Tensor,
        restores: Tensor,
        coeffs: Tensor,
        decay: Tensor,
        rule: str,
        rounding: Tensor | None,
        transform: str,
        squares: Tensor | None,
    ) -> None:
        """As `zo_fused.sweeps.reference.moments_`; the states of the launch are m and, for adam,
        v. With squares, [P, K], there are none."""

    def lowrank(
        self, launch: Launch, coeffs: Tensor | None, decay: Tensor, rounding: Tensor | None
    ) -> None:
        """p = round(decay * p + coeff * u @ v.T); without coeffs, round(decay * p + u @ v.T)"""

    def momentum(self, launch: Launch, coeffs: Tensor) -> None:
        """The tensors of the launch are factors n, its states u and a:
        n = beta * n + grad * u, a = restore * u + step * n; coeffs: [P, 4]."""


@contextlib.contextmanager
def _device_of(tensor: Tensor) -> Iterator[None]:
    """Makes the tensor's device current, to which kernels are launched."""
    with torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext():
        yield


class MultiTensor:
    """The sweeps over the kernels that `load` returns (loaded at the first sweep)."""

    def __init__(self, load: Callable[[], Kernels]) -> None:
        self._load = load
        self.cache = table.Cache()

    # ---- launches ---------------------------------------------------------------------------

    def _noise_launches(
        self,
        tensors: Sequence[Tensor],
        ids: Tensor,
        offsets: Tensor,
        states: Sequence[Sequence[Tensor]] = (),
    ) -> list[Launch]:
        states = [state for state in states if state]

        def build() -> list[Launch]:
            chunk = self._load().CHUNK
            rows = table.noise_rows(tensors, ids.tolist(), offsets.tolist(), states, chunk)
            return table.launches(rows, tensors[0].device)

        return self.cache.get(("noise", *_key(tensors, *states), *_key(ids, offsets)), build)

    def _lowrank_launches(
        self,
        params: Sequence[Tensor],
        us: Sequence[Tensor],
        vs: Sequence[Tensor],
        ids: Tensor | None,
        offsets: Tensor | None,
    ) -> list[Launch]:
        zeros = torch.zeros(len(params), dtype=torch.int64, device="cpu")
        ids = zeros if ids is None else ids
        offsets = zeros if offsets is None else offsets

        def build() -> list[Launch]:
            tile = self._load().TILE
            rows = table.lowrank_rows(params, us, vs, ids.tolist(), offsets.tolist(), tile)
            return table.launches(rows, params[0].device)

        return self.cache.get(("low rank", *_key(params, us, vs), *_key(ids, offsets)), build)

    def _momentum_launches(
        self, params: Sequence[Tensor], moments: Sequence[Tensor], us: Sequence[Tensor]
    ) -> tuple[list[Launch], list[Tensor]]:
        """Launches over the moments of parameters that have elements, and the factors that they
        write: as long as the launches are kept, in the same memory."""

        def build() -> tuple[list[Launch], list[Tensor]]:
            factors = [torch.empty_like(u) for u in us]
            zeros = [0] * len(us)
            rows = table.noise_rows(moments, zeros, zeros, (us, factors), self._load().CHUNK)
            for row, param in zip(rows, params, strict=True):
                row.programs *= param.numel() > 0
            return table.launches(rows, us[0].device), factors

        empty = tuple(p.numel() == 0 for p in params)
        return self.cache.get(("momentum", empty, *_key(moments, us)), build)

    # ---- prepared ---------------------------------------------------------------------------

    def prepare(
        self,
        name: str,
        lists: Sequence[Sequence[Tensor]],
        ids: Tensor | None,
        offsets: Tensor | None,
    ) -> Callable[..., None]:
        """A sweep over these tensors, which must stay alive and where they are. It takes the other
        arguments in the order of the schema."""
        makers: dict[str, Callable[..., Callable[..., None]]] = {
            "bits_": self._bits,
            "normal_": self._normal,
            "dense_": self._dense,
            "dense_steps_": self._dense_steps,
            "moments_": self._moments,
            "lowrank_": self._lowrank,
            "lowrank_steps_": self._lowrank_steps,
            "lowrank_momentum_": self._lowrank_momentum,
        }
        with _device_of(lists[0][0]):
            return makers[name](*lists, ids, offsets)

    def _bits(self, outs: Sequence[Tensor], ids: Tensor, offsets: Tensor) -> Callable[..., None]:
        kernels, launches = self._load(), self._noise_launches(outs, ids, offsets)

        def sweep(keys: Tensor) -> None:
            with _device_of(keys):
                for launch in launches:
                    kernels.bits(launch, keys.contiguous())

        return sweep

    def _normal(self, outs: Sequence[Tensor], ids: Tensor, offsets: Tensor) -> Callable[..., None]:
        kernels, launches = self._load(), self._noise_launches(outs, ids, offsets)

        def sweep(keys: Tensor, transform: str = "portable") -> None:
            with _device_of(keys):
                for launch in launches:
                    kernels.normal(launch, keys.contiguous(), transform)

        return sweep

    def _dense(self, params: Sequence[Tensor], ids: Tensor, offsets: Tensor) -> Callable[..., None]:
        kernels, launches = self._load(), self._noise_launches(params, ids, offsets)

        def sweep(
            keys: Tensor,
            coeffs: Tensor,
            decay: Tensor,
            rounding: Tensor | None = None,
            transform: str = "portable",
        ) -> None:
            keys, coeffs, decay = keys.contiguous(), coeffs.contiguous(), decay.contiguous()
            with _device_of(decay):
                for launch in launches:
                    kernels.dense(launch, keys, coeffs, decay, rounding, transform)

        return sweep

    def _dense_steps(
        self, params: Sequence[Tensor], ids: Tensor, offsets: Tensor
    ) -> Callable[..., None]:
        """In one pass if there is a kernel for it, else sweep by sweep."""
        fused = getattr(self._load(), "dense_steps", None)
        launches = self._noise_launches(params, ids, offsets)
        single = self._dense(params, ids, offsets)

        def sweep(
            keys: Tensor,
            script: Tensor,
            coeffs: Tensor,
            decay: Tensor,
            transform: str = "portable",
        ) -> None:
            if fused is None:
                for rows in scripts.dense(keys, script, coeffs, decay):
                    single(*rows, transform)
                return
            tensors = [tensor.contiguous() for tensor in (keys, script, coeffs, decay)]
            with _device_of(decay):
                for launch in launches:
                    fused(launch, *tensors, transform)

        return sweep

    def _moments(
        self,
        params: Sequence[Tensor],
        firsts: Sequence[Tensor],
        seconds: Sequence[Tensor],
        ids: Tensor,
        offsets: Tensor,
    ) -> Callable[..., None]:
        kernels = self._load()
        launches = self._noise_launches(params, ids, offsets, (firsts, seconds))

        def sweep(
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
            keys, grads, restores = keys.contiguous(), grads.contiguous(), restores.contiguous()
            coeffs, decay = coeffs.contiguous(), decay.contiguous()
            squares = None if squares is None else squares.contiguous()
            scalars = (keys, grads, restores, coeffs, decay)
            with _device_of(decay):
                for launch in launches:
                    kernels.moments(launch, *scalars, rule, rounding, transform, squares)

        return sweep

    def _lowrank(
        self,
        params: Sequence[Tensor],
        us: Sequence[Tensor],
        vs: Sequence[Tensor],
        ids: Tensor | None,
        offsets: Tensor | None,
    ) -> Callable[..., None]:
        kernels, launches = self._load(), self._lowrank_launches(params, us, vs, ids, offsets)

        def sweep(coeffs: Tensor, decay: Tensor, rounding: Tensor | None = None) -> None:
            coeffs, decay = coeffs.contiguous(), decay.contiguous()
            with _device_of(decay):
                for launch in launches:
                    kernels.lowrank(launch, coeffs, decay, rounding)

        return sweep

    def _lowrank_steps(
        self,
        params: Sequence[Tensor],
        us: Sequence[Tensor],
        vs: Sequence[Tensor],
        ids: Tensor,
        offsets: Tensor,
    ) -> Callable[..., None]:
        """Sweep by sweep: there is no kernel for it."""
        products = [
            self._lowrank(params, [u[product] for u in us], vs, ids, offsets)
            for product in range(us[0].shape[0])
        ]

        def sweep(keys: Tensor, script: Tensor, coeffs: Tensor, decay: Tensor) -> None:
            for product, rows in scripts.lowrank(keys, script, coeffs, decay):
                products[product](*rows)

        return sweep

    def _lowrank_momentum(
        self,
        params: Sequence[Tensor],
        moments: Sequence[Tensor],
        us: Sequence[Tensor],
        vs: Sequence[Tensor],
        ids: Tensor | None,
        offsets: Tensor | None,
    ) -> Callable[..., None]:
        kernels = self._load()
        moment_launches, factors = self._momentum_launches(params, moments, us)
        launches = self._lowrank_launches(params, factors, vs, ids, offsets)

        def sweep(coeffs: Tensor, decay: Tensor, rounding: Tensor | None = None) -> None:
            coeffs, decay = coeffs.contiguous(), decay.contiguous()
            with _device_of(decay):
                for launch in moment_launches:
                    kernels.momentum(launch, coeffs)
                for launch in launches:
                    kernels.lowrank(launch, None, decay, rounding)

        # The launches hold only addresses; the sweep must hold the memory.
        sweep.factors = factors  # type: ignore[attr-defined]
        return sweep

    # ---- on lists ---------------------------------------------------------------------------

    def bits_(self, outs: Sequence[Tensor], ids: Tensor, offsets: Tensor, keys: Tensor) -> None:
        self.prepare("bits_", (outs,), ids, offsets)(keys)

    def normal_(
        self,
        outs: Sequence[Tensor],
        ids: Tensor,
        offsets: Tensor,
        keys: Tensor,
        transform: str = "portable",
    ) -> None:
        self.prepare("normal_", (outs,), ids, offsets)(keys, transform)

    def dense_(
        self,
        params: Sequence[Tensor],
        ids: Tensor,
        offsets: Tensor,
        keys: Tensor,
        coeffs: Tensor,
        decay: Tensor,
        rounding: Tensor | None = None,
        transform: str = "portable",
    ) -> None:
        rows = (keys, coeffs, decay, rounding, transform)
        self.prepare("dense_", (params,), ids, offsets)(*rows)

    def dense_steps_(
        self,
        params: Sequence[Tensor],
        ids: Tensor,
        offsets: Tensor,
        keys: Tensor,
        script: Tensor,
        coeffs: Tensor,
        decay: Tensor,
        transform: str = "portable",
    ) -> None:
        rows = (keys, script, coeffs, decay, transform)
        self.prepare("dense_steps_", (params,), ids, offsets)(*rows)

    def moments_(
        self,
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
        rows = (keys, grads, restores, coeffs, decay, rule, rounding, transform, squares)
        self.prepare("moments_", (params, firsts, seconds), ids, offsets)(*rows)

    def lowrank_(
        self,
        params: Sequence[Tensor],
        us: Sequence[Tensor],
        vs: Sequence[Tensor],
        coeffs: Tensor,
        decay: Tensor,
        ids: Tensor | None = None,
        offsets: Tensor | None = None,
        rounding: Tensor | None = None,
    ) -> None:
        self.prepare("lowrank_", (params, us, vs), ids, offsets)(coeffs, decay, rounding)

    def lowrank_steps_(
        self,
        params: Sequence[Tensor],
        us: Sequence[Tensor],
        vs: Sequence[Tensor],
        ids: Tensor,
        offsets: Tensor,
        keys: Tensor,
        script: Tensor,
        coeffs: Tensor,
        decay: Tensor,
    ) -> None:
        rows = (keys, script, coeffs, decay)
        self.prepare("lowrank_steps_", (params, us, vs), ids, offsets)(*rows)

    def lowrank_momentum_(
        self,
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
        lists = (params, moments, us, vs)
        self.prepare("lowrank_momentum_", lists, ids, offsets)(coeffs, decay, rounding)


def _key(*parts: Sequence[Tensor] | Tensor) -> tuple[object, ...]:
    """What a table depends on: where tensors are and what they are; what host tensors hold."""
    return tuple(
        part.numpy().tobytes()
        if isinstance(part, Tensor)
        else tuple((t.data_ptr(), t.dtype, t.shape, t.device) for t in part)
        for part in parts
    )
