"""Sweeps over the same tensors again and again.

A call of an operator (`zo_fused.sweeps.operators`) looks at every tensor of its lists: for a few
hundred parameters that takes longer than a small model's sweep. A prepared sweep looks once, and
what it does in Python at a call does not depend on the number of parameters.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from zo_fused.sweeps import operators
from zo_fused.sweeps.arguments import Checked, check_apart, check_lists, check_rows
from zo_fused.sweeps.signatures import SWEEPS, Lists


def _addresses(tensors: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple(map(torch.Tensor.data_ptr, tensors))  # a loop in C


class Prepared:
    """A sweep whose lists of tensors, ids and offsets are fixed.

    It holds the tensors, but not the memory of those that it writes: they may move at any time
    (``p.data = ..``, ``model.half()``). The next call finds that an address is another one, or that
    memory was freed (an address may come back for a smaller tensor), and prepares the sweep again.

    The factors of low-rank sweeps are read where they were: write new ones in place.
    """

    _checked: Checked
    _seen: tuple[int, ...]  # addresses of what is written
    _versioned: list[Tensor]  # what autograd must be told of
    _freed: list[Any]  # dead references to storages; not empty: memory was freed
    _backend: Any  # whose sweep it is; None: not made yet
    _sweep: Callable[..., None]

    def __init__(self, name: str, lists: Lists, ids: Tensor | None, offsets: Tensor | None) -> None:
        if name not in SWEEPS or len(lists) != len(SWEEPS[name].lists):
            raise ValueError(f"zo_fused: {name!r} is no sweep over {len(lists)} lists of tensors")
        self._name, written = name, SWEEPS[name].written
        read_only = [[tensor.detach() for tensor in tensors] for tensors in lists[written:]]
        self._lists = [*map(list, lists[:written]), *read_only]
        self._written = tuple(chain.from_iterable(self._lists[:written]))
        streams = (ids, offsets) if SWEEPS[name].has_streams else (None, None)
        self._ids, self._offsets = (None if row is None else row.clone() for row in streams)
        self._look()

    def __call__(self, *rows: Any, **options: Any) -> None:
        """Sweep.

        Args:
            rows, options: the other arguments of the operator, in the order of its schema: for
                ``dense_`` keys, coeffs, decay, rounding=None, transform="portable".

        Raises:
            TypeError, ValueError: as the operator. Nothing has been written then.
        """
        self.look_again()
        self._swept(check_rows(self._checked, *rows, **options), rows, options)
        torch.autograd.graph.increment_version(self._versioned)

    def run(self, *rows: Any, **options: Any) -> None:
        """Sweep, for callers who know that the rows fit, call `look_again` when tensors may have
        moved and tell autograd what was written: here only freed memory is noticed. A transform is
        given by name."""
        if self._freed:
            self._look()
            check_rows(self._checked, *rows, **options)
        self._swept(options.get("transform", "portable"), rows, options)

    def look_again(self) -> None:
        """Prepare the sweep anew if something that it writes has moved."""
        if self._freed or _addresses(self._written) != self._seen:
            self._look()

    def _swept(self, transform: str, rows: tuple[Any, ...], options: dict[str, Any]) -> None:
        if self._checked.device is None:
            return
        backend = operators.backend_for(self._checked.device, transform)
        if backend is not self._backend:
            self._sweep = self._made_by(backend)
            self._backend = backend
        self._sweep(*rows, **options)

    def _look(self) -> None:
        """Check the lists and remember where they are; the backend's sweep is made when called."""
        self._checked = check_lists(self._name, self._lists, self._ids, self._offsets)
        check_apart(self._name, self._lists)
        self._backend, self._sweep = None, _not_made
        self._freed = []
        storages = (tensor.untyped_storage() for tensor in self._written)
        self._watched = [weakref.ref(storage, self._freed.append) for storage in storages]
        self._seen = _addresses(self._written)
        self._versioned = [tensor for tensor in self._written if not tensor.is_inference()]

    def _made_by(self, backend: Any) -> Callable[..., None]:
        arguments = (self._lists, self._ids, self._offsets)
        contiguous = all(map(torch.Tensor.is_contiguous, self._written))
        if contiguous and hasattr(backend, "prepare"):
            sweep: Callable[..., None] = backend.prepare(self._name, *arguments)
            return sweep
        functions = backend if contiguous else torch.ops.zo_fused
        function = getattr(functions, self._name)
        return torch.no_grad()(SWEEPS[self._name].bind(function, *arguments))


def _not_made(*rows: Any, **options: Any) -> None:
    raise AssertionError("a sweep is made by its backend first")


def prepare(name: str, lists: Lists, ids: Tensor | None, offsets: Tensor | None) -> Prepared:
    """A sweep to be called often.

    Args:
        name: of an operator, e.g. ``"dense_"``.
        lists: its lists of tensors, in the order of its schema: for ``lowrank_``
            ``[params, us, vs]``.
        ids, offsets: as the operator's, or None where it can do without. Not used if it has none.

    Raises:
        TypeError, ValueError: as the operator.
    """
    return Prepared(name, lists, ids, offsets)
