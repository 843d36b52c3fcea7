"""Parameters that are DTensors: what a process sweeps of them, and who can't tune them."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from zo_fused.parallel.groups import Groups
from zo_fused.sweeps.shards import (
    Cut,
    Run,
    Shard,
    cut_among,
    is_sharded,
    local,
    of_runs,
    shard_of,
    whole_of,
)


class Rows:
    """The tensors that sweeps take of the parameters of a bucket.

    Args:
        params: DTensors, or others, which are whole here.
        labels: what to call them.
        matrices: whether a sweep sees a shard as a matrix; else it is swept run by run.
        every: whether empty shards have a row, too.

    Attributes:
        params: these tensors.
        row: of each, the position of its parameter.
        offsets: of each, the index of its first element in the full parameter.
        places: of each, where it lies, if they are matrices.
    """

    def __init__(
        self, params: Sequence[Tensor], labels: Sequence[str], matrices: bool, every: bool
    ) -> None:
        parts = [local(p).detach() if is_sharded(p) else p for p in params]
        places = [
            shard_of(p, label) if is_sharded(p) else whole_of(p)
            for p, label in zip(params, labels, strict=True)
        ]
        for p, label in zip(parts, labels, strict=True):
            if not p.is_contiguous():
                raise ValueError(
                    f"zo_fused: {label} has strides {p.stride()} in a sharded model, where "
                    "parameters must be contiguous"
                )
        self._cut = Cut(parts, places)
        self.places: list[Shard] = []
        if matrices:
            self.row = [i for i, p in enumerate(parts) if every or p.numel()]
            self.params = [parts[i] for i in self.row]
            self.places = [places[i] for i in self.row]
            runs = [places[i].runs(parts[i].shape) for i in self.row]
            self.offsets = [some[0].start if some else 0 for some in runs]
        else:
            self.row, self.params = self._cut.row, self._cut.tensors
            self.offsets = self._cut.starts or []

    def like(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Tensors like the parameters, as the sweeps over runs take them."""
        return self._cut.like([local(tensor) for tensor in tensors], "state")

    def check_rounding(self) -> None:
        """Random bits of rounding are those of an element's place, which a sweep of matrices counts
        on from the first.

        Raises:
            NotImplementedError: a matrix was cut along its columns.
        """
        for row in self.cut_along_columns():
            raise NotImplementedError(
                f"a parameter of shape {self.places[row].global_shape} is cut along its columns, "
                'which low-rank updates with rounding="stochastic" can\'t be: rounding="nearest"'
            )

    def cut_along_columns(self) -> list[int]:
        """Rows with matrices of which a process has a part of each line."""
        pairs = enumerate(zip(self.params, self.places, strict=True))
        return [row for row, (p, place) in pairs if len(place.runs(p.shape)) > 1]

    def sides(self, row: int) -> tuple[list[Run], list[Run]]:
        """The rows and the columns of a matrix that are here, among those of the whole one."""
        place, shape = self.places[row], self.params[row].shape
        return place.rows(shape), place.columns(shape)

    def parts_of(self, factors: Sequence[Tensor], along: str) -> list[Tensor]:
        """Of factors of whole matrices, a row each, what belongs to the rows or the columns that
        are here. They were cut in one place each."""
        found = []
        for row, factor in enumerate(factors):
            runs = self.sides(row)[along == "columns"]
            first, count = (runs[0].start, runs[0].length) if runs else (0, 0)
            found.append(factor[first : first + count])
        return found

    def of_matrices(
        self, factors: Sequence[Tensor], rows: Sequence[int], along: str
    ) -> tuple[list[Tensor], list[int], list[int]]:
        """Factors of the matrices in these rows as `zo_fused.sweeps.shards.of_runs` has them.

        Args:
            along: as in `Bucket.fill`.
        """
        runs = [self.sides(row)[along == "columns"] for row in rows]
        if along == "vectors":
            for i, (row, factor) in enumerate(zip(rows, factors, strict=True)):
                if self.params[row].dim() > 1:
                    runs[i] = [Run(0, 0, len(factor))]
        return of_runs(factors, runs)


def rows_like(p: Any, part: Tensor) -> Tensor:
    """A matrix with a row for each of a DTensor, placed as that is.

    Args:
        p: a DTensor.
        part: the rows that are here.

    Raises:
        NotImplementedError: it was cut along another dimension.
    """
    from torch.distributed.tensor import DTensor

    if any(getattr(placement, "dim", 0) for placement in p.placements):
        raise NotImplementedError(
            f"a parameter of shape {tuple(p.shape)} is cut along its columns, and what a low-rank "
            "method keeps between steps is for whole rows: shard it along its first dimension, as "
            "FSDP2 does, or do without momentum"
        )
    shape = torch.Size((p.shape[0], part.shape[1]))
    stride = (part.shape[1], 1)
    return DTensor.from_local(
        part, p.device_mesh, p.placements, run_check=False, shape=shape, stride=stride
    )


class HasReason(Protocol):
    """A direction or a rule. What a class itself says counts, not what it inherits: a subclass may
    look at whole tensors."""

    def not_sharded(self) -> str:
        """Why parameters may not be sharded; empty if they may."""


def check_sharded(
    method: str,
    params: Sequence[Tensor],
    labels: Sequence[str],
    module: nn.Module | None,
    *parts: HasReason,
) -> None:
    """Refuse sharded parameters where they can't be tuned.

    Raises:
        NotImplementedError: the method, or an option of it, needs whole tensors.
        ValueError: the optimizer was not given the module.
    """
    label = next((name for p, name in zip(params, labels, strict=True) if is_sharded(p)), None)
    if label is None:
        return
    for part in parts:
        kind, reason = type(part), part.not_sharded()
        if not reason and "not_sharded" not in vars(kind):
            reason = f"{kind.__name__} needs it whole"
        if reason:
            raise NotImplementedError(
                f"{method} can't tune parameter {label}, a DTensor, like this: {reason}. "
                "docs/sharded.md says what can be done with sharded parameters; MeZO can"
            )
    moving = (n for p, n in zip(params, labels, strict=True) if is_sharded(p) and p.requires_grad)
    label = next(moving, None)  # none in a replay, where the module is not looked at
    if module is None and label is not None:
        raise ValueError(
            f"parameter {label} is a DTensor: give the optimizer the whole module, as in "
            "MeZO(model, ..), so that it can see to it that forward passes use what it has changed"
        )


def check_told(params: Sequence[Tensor], groups: Groups | None) -> None:
    """All processes that have parts of a parameter must tell each other their losses.

    Args:
        groups: of the ranks that do; None: there are no others.

    Raises:
        NotImplementedError: not all of them do.
    """
    among = {group for p in params if is_sharded(p) for group in cut_among(p) if group.size() > 1}
    told = groups is not None and all(map(groups.covers, among))
    if among and not told:
        raise NotImplementedError(
            "parameters are sharded among processes that don't tell each other their losses: "
            'parallel="auto" has all do, zo_fused.Parallel(data=mesh["shard"], query=mesh["query"])'
            " those of a mesh (docs/sharded.md)"
        )


def wrapped_by_fsdp(module: nn.Module) -> list[Any]:
    """Its modules that `fully_shard` has wrapped, from the outside in."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    return [part for part in module.modules() if isinstance(part, kind)]


class Resharding:
    """Keeps FSDP2 from computing with weights of before a sweep.

    After a forward pass without gradients its root (and whatever was made with
    ``reshard_after_forward=False``) keeps the gathered weights for the next one, which then does
    not see what was done to the shards.

    Args:
        module: that was given to the optimizer.
    """

    def __init__(self, module: nn.Module | None) -> None:
        self._wrapped = [] if module is None else wrapped_by_fsdp(module)
        inner = {id(m) for part in self._wrapped for m in part.modules() if m is not part}
        self._roots = [part for part in self._wrapped if id(part) not in inner]
        self._ran: list[Any] = []  # roots of which forward passes have begun
        self._hooks: list[Any] = []

    def close(self) -> None:
        """Free gathered weights, now and after every forward pass from here on. To be called when
        no forward pass is under way.

        What FSDP2 remembers of forward passes goes, too. It waits for a backward pass: of each one
        the list would grow, and after one that an error broke off the next one's copies (on a GPU,
        in streams of their own) would not wait for what a sweep writes.
        """
        ran, self._ran = self._ran, []
        for module in ran:
            if hasattr(module, "reset_iter_state"):  # from PyTorch 2.13 on
                with suppress(RuntimeError):  # the root of the forward passes is another one
                    module.reset_iter_state()
        for module in self._wrapped:
            module.reshard()
            module.set_reshard_after_forward(True, recurse=False)

    def before_forward(self, look: Callable[[], None]) -> None:
        """Forward passes gather shards without asking the parameters; this is asked instead."""
        for hook in self._hooks:
            hook.remove()
        asked = weakref.WeakMethod(look)

        def hook_of(*_: Any) -> None:
            if (method := asked()) is not None:
                method()

        def began(module: nn.Module, _: Any) -> None:
            self._ran = [*(m for m in self._ran if m is not module), module]

        self._hooks = [m.register_forward_pre_hook(began) for m in self._roots]
        self._hooks += [m.register_forward_pre_hook(hook_of, prepend=True) for m in self._wrapped]
