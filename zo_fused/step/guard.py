"""Parameters that put themselves at theta when somebody looks.

Between the steps of a deferred or factored schedule the weights are not at theta. A guarded
parameter puts them there before anything reads or writes it: a save, a copy, a merge of an adapter,
a forward pass, another optimizer, whether it comes by the module or by the parameter. It does so by
its class, which is changed between steps only: within a step it is what it was. What was made from
a parameter beforehand (``p.data``, ``p.detach()``) shares its memory and escapes.
"""

from __future__ import annotations

import copy
import os
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from zo_fused.recording import capturing


class _Guarded:
    """What a guarded parameter's class puts before its own."""

    own: type  # the parameter's class at other times
    to_theta: Callable[[], None]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        cls.to_theta()
        for value in (*args, *kwargs.values()):
            for inner in value if isinstance(value, list | tuple) else (value,):
                if type(inner) is cls:  # not one of ours: it was given the class of one
                    inner.__class__ = cls.own
        return func(*args, **kwargs)  # where other guards and classes have their say

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._at_theta(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._at_theta().__reduce_ex__(protocol)

    def _at_theta(self) -> Any:
        kind = type(self)
        self.to_theta()
        if type(self) is kind:
            self.__class__ = kind.own
        return self


def _tensor_of_shards() -> Any:
    """`DTensor`, if anybody has one."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())


def _local_at_theta(p: Any) -> Any:
    return p._at_theta()._local_tensor


def _set_local_at_theta(p: Any, value: Any) -> None:
    type(p._at_theta())._local_tensor.__set__(p, value)


class Guard:
    """Guards the parameters of an optimizer.

    Args:
        to_theta: puts the weights at theta, then calls `lift`; from any thread. The guarded
            parameters keep it alive, and with it the optimizer, so that an update which waits for
            theta isn't lost.
    """

    def __init__(self, to_theta: Callable[[], None]) -> None:
        self._to_theta = to_theta
        self._kinds: dict[type, type] = {}
        self._params: list[tuple[Any, type, type]] = []  # each with its class and the guarded one
        self._set = False
        self._process = 0  # that has set it

    def over(self, params: Sequence[Tensor]) -> None:
        """Guard these from here on.

        Raises:
            TypeError: the class of a parameter can't be changed.
        """
        self.lift()
        self._params = [(p, type(p), self._kind(p)) for p in params]

    def set(self) -> None:
        """From here on, whoever looks finds theta."""
        if not self._set:
            self._set = True
            self._process = os.getpid()
            for p, _, guarded in self._params:
                p.__class__ = guarded

    def lift(self) -> None:
        """Parameters are what they were."""
        if self._set:
            self._set = False
            for p, own, _ in self._params:
                p.__class__ = own

    def look(self) -> None:
        """For what looks at parameters without asking them."""
        if self._set:
            self._look()

    def _kind(self, p: Any) -> type:
        own = type(p)
        if own not in self._kinds:
            # A compiler that traces a forward pass at rest shall run this, not trace it.
            reason = "the weights are not at theta: call flush() of their optimizer first"
            look = torch.compiler.disable(self._look, reason=reason)
            members = {"own": own, "to_theta": staticmethod(look), "__module__": own.__module__}
            if issubclass(own, _tensor_of_shards()):  # `to_local` and others read it
                members["_local_tensor"] = property(_local_at_theta, _set_local_at_theta)
            guarded = type(own.__name__, (_Guarded, own), members)
            try:
                p.__class__ = guarded
            except TypeError as error:
                raise TypeError(
                    f"zo_fused: parameters of class {own.__name__} can't be watched while their "
                    "weights are not at theta; make plain ones of them (torch.nn.Parameter)"
                ) from error
            p.__class__ = own
            self._kinds[own] = guarded
        return self._kinds[own]

    def _look(self) -> None:
        if capturing() or torch._C._get_tracing_state() is not None:
            # it would go into what is recorded, and happen again at every replay
            raise RuntimeError(
                "the weights are not at theta: opt.flush() before a capture or trace"
            )
        if os.getpid() != self._process and any(p.is_shared() for p, own, kind in self._params):
            raise RuntimeError(
                "the weights are not at theta, and another process has them, too: opt.flush() there"
            )
        with _disable_current_modes():  # what is traced, or made of fake tensors, is not this
            self._to_theta()


class _Displaced:
    """Optimizers that are in a step or have perturbed their weights on demand: what they do must
    not be mixed with what another optimizer does to the same weights."""

    def __init__(self) -> None:
        self._them: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()

    def enter(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer begins.

        Raises:
            RuntimeError: another one is not done with the same parameters.
        """
        others = [other for other in list(self._them) if other is not optimizer]
        if others:
            mine = _tuned(optimizer)
            for other in others:
                if mine & _tuned(other):
                    raise RuntimeError(
                        f"a {type(other).__name__} has perturbed parameters of this "
                        f"{type(optimizer).__name__}: end its step, or flush() it, first"
                    )
        self._them.add(optimizer)

    def leave(self, optimizer: torch.optim.Optimizer) -> None:
        """Its weights are at theta, or guarded."""
        self._them.discard(optimizer)


def _tuned(optimizer: Any) -> set[int]:
    groups = optimizer.param_groups
    return {id(p) for group in groups for p in group["params"] if optimizer.moves(p)}


DISPLACED = _Displaced()


def reading(name: str) -> Callable[..., Any]:
    """What `__torch_function__` is given for reading an attribute of a tensor."""
    return getattr(Tensor, name).__get__


# fmt: off
_ATTRIBUTES = (
    "shape", "dtype", "device", "layout", "ndim", "itemsize", "nbytes", "requires_grad", "is_leaf",
    "is_cpu", "is_cuda", "is_xpu", "is_mps", "is_meta", "is_sparse", "is_sparse_csr",
    "is_quantized", "is_nested", "grad",
)


_METHODS = (
    "size", "stride", "dim", "ndimension", "numel", "nelement", "element_size", "storage_offset",
    "get_device", "is_contiguous", "is_floating_point", "is_complex", "is_inference", "__len__",
)


# fmt: on
METADATA = {
    *map(reading, _ATTRIBUTES),
    *(getattr(Tensor, name) for name in _METHODS),
    *(torch.is_floating_point, torch.is_complex, torch.numel, torch.is_inference),
}
