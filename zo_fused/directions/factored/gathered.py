"""Stand-ins for weights that FSDP2 gathers: a forward pass has other tensors in their places."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zo_fused.directions.factored.side_weight import SideWeight
from zo_fused.directions.factored.stand_ins import Places
from zo_fused.step.direction import UsedOtherwise
from zo_fused.step.sharded import wrapped_by_fsdp
from zo_fused.sweeps.shards import is_sharded


class Beside(NamedTuple):
    """A parameter, and what is added to it: see `SideWeight`. The factors are of the whole."""

    param: Tensor
    b: Tensor
    v: Tensor
    scale: Tensor | None


@cache
def _asked(kind: type) -> type:
    """A class of DTensors whose methods raise `UsedOtherwise`: those that are no functions of
    torch, so that no mode sees them."""

    def of(name: str) -> Any:
        def asked(self: Tensor, *args: Any, **kwargs: Any) -> None:
            raise UsedOtherwise(self, name)

        return asked

    names = ("full_tensor", "to_local", "redistribute")
    return type(kind.__name__, (kind,), {name: of(name) for name in names})


class Gathered:
    """Puts stand-ins where FSDP2 has put gathered weights; it puts the shards back itself.

    Args:
        module: what the closure runs.
        places: where it holds its parameters.
        params: shards.

    Attributes:
        left_out: id of a parameter -> why it can have no stand-in.
        raw: id of a gathered weight -> its parameter, of the forward passes so far.
    """

    def __init__(self, module: nn.Module, places: Places, params: Sequence[Tensor]) -> None:
        self.left_out: dict[int, str] = {}
        self.raw: dict[int, Tensor] = {}
        self._shards = [p for p in params if p in places]
        self._beside: dict[int, Beside] = {}
        self._made: dict[int, SideWeight] = {}
        wrapped = wrapped_by_fsdp(module)
        gathers: dict[int, nn.Module] = {}  # the innermost one gathers what a module holds
        for part in wrapped:  # from the outside in
            gathers |= {id(inner): part for inner in part.modules()}
        self._held: dict[nn.Module, list[tuple[dict[str, Any], str, int]]] = {}
        for p in params:
            for owner, _, name in places.of(p):
                if (part := gathers.get(id(owner))) is None:
                    self.left_out[id(p)] = "is a shard that FSDP2 does not gather"
                else:
                    place = (owner._parameters, name, id(p))
                    self._held.setdefault(part, []).append(place)

    @contextmanager
    def attached(self, beside: Mapping[int, Beside]) -> Iterator[None]:
        """While open, forward passes have stand-ins.

        Args:
            beside: by the id of a parameter.
        """
        self._beside = dict(beside)
        modules = self._held if beside else ()
        hooks = [module.register_forward_pre_hook(self._enter) for module in modules]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for places in self._held.values():  # a pass that was broken off has left them
                for table, name, _ in places:
                    if isinstance(held := table.get(name), SideWeight):
                        table[name] = held.raw

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While open, whoever asks a shard itself for its weights is told."""
        kinds = [(p, type(p)) for p in self._shards]
        for p, kind in kinds:
            p.__class__ = _asked(kind)
        try:
            yield
        finally:
            for p, kind in kinds:
                p.__class__ = kind

    def _enter(self, module: nn.Module, _: Any) -> None:
        """After the hook of FSDP2."""
        for table, name, key in self._held[module]:
            held = table[name]
            if key in self._beside and not isinstance(held, SideWeight):
                table[name] = self._stand_in(key, held)

    def _stand_in(self, key: int, held: Tensor) -> SideWeight:
        param, b, v, scale = self._beside[key]
        if is_sharded(held):
            raise UsedOtherwise(param, "tensor parallel layers")
        self.raw[id(held)] = param
        made = self._made.get(key)
        if made is None or made.raw is not held or b.dtype != held.dtype:
            with torch._C.DisableTorchFunction():  # nobody who watches uses it is to see this one
                b, v = b.to(held.dtype), v.to(held.dtype)  # mixed precision: they are copies
                made = self._made[key] = SideWeight.make(held, b, v, scale, param)
        return made
